"""What was mined, for a person: how many candidates and negatives, their scores, and one query with its passages."""

from typing import Any

from rich.console import Group
from rich.text import Text

from launch.counted import counted
from launch.phases import clock
from launch.tables import Sheet, as_text

EXCERPT_LINES = 8


def written_parts(found: dict[str, Any]) -> Group:
    """Return what was mined as tables."""
    candidates, counts, audit = found["counts"]["candidates"], found["counts"], found["audit"]
    rows = [
        (f"candidates, up to {found['top_k']:,} of each query", candidates),
        *((f"dropped: {name}", number) for name, number in found["dropped"].items()),
    ]
    sheet = Sheet(
        f"{counted(found['num_queries'], 'query')}, {counted(found['num_passages'], 'passage')}",
        ("", "number", "of the candidates"),
        [(name.replace("_", " "), f"{number:,}", f"{number / max(1, candidates):.1%}") for name, number in rows],
    )
    drawn = [
        (f"negatives, up to {found['num_negatives_each']:,} of each query", found["num_negatives"]),
        ("of them random passages", counts.get("random", 0)),
        ("random passages drawn again: a rule dropped the first", counts.get("redrawn", 0)),
        ("places that stay empty: rules dropped all that were drawn", counts.get("unfilled", 0)),
        ("queries without any that passed", counts["queries_without"]),
        ("queries with fewer negatives", found["num_short_rows"] - found["num_empty_rows"]),
        ("queries without negatives", found["num_empty_rows"]),
    ]
    drawn = [drawn[0], *((name, number) for name, number in drawn[1:] if number)]
    columns = ["negatives", *(["positives"] if audit["positive_scores"] else [])]
    scores = zip(*(audit[name].items() for name in ("scores", "positive_scores") if audit[name]), strict=True)
    quantiles = [(f"{int(each[0][0][1:])} %", *(f"{value:.3f}" for _, value in each)) for each in scores]
    times = ", ".join(f"{name} {clock(seconds)}" for name, seconds in found["seconds"].items() if seconds >= 1)
    parts = [sheet, Sheet("drawn", ("", "number"), [(name, f"{number:,}") for name, number in drawn])]
    parts += [Sheet("quantiles of scores", ("", *columns), quantiles)] if quantiles else []
    ends = [f"Recall of the index: {audit['recall']:.3f}."] if audit["recall"] is not None and audit["recall"] < 1 else []
    ends += [f"Time: {times}."] if times else []
    return as_text([*parts, *ends, *found["said"], f"{found['out']}: {found['records']:,} records, form {found['form']}."])


def shown_parts(found: dict[str, Any]) -> Group:
    """Return a query, its positives and its negatives, each with its scores."""
    source = "BM25" if found["source"] == "bm25" else f"the checkpoint of step {found['checkpoint_step']}"
    source = source if found["checkpoint_step"] or found["source"] == "bm25" else "the model"
    cluster = f", cluster {found['cluster']}" if "cluster" in found else ""
    lines = [Text(f"query {found['query_id']}  (scores of {source}{cluster})", style="bold"), Text(found["query"] + "\n")]
    best = max((passage["score"] for passage in found["positives"] if "score" in passage), default=None)
    for kind, style in (("positive", "green"), ("negative", "red")):
        for number, passage in enumerate(found[f"{kind}s"], 1):
            scores = [f"{name.replace('_', ' ')} {passage[name]:.3f}" for name in ("score", "teacher_score") if name in passage]
            above = ["above the best positive"] if kind == "negative" and best is not None and passage["score"] >= best else []
            lines.append(Text(f"{kind} {number}: {passage['id']}   " + "   ".join([*scores, *above]), style=f"bold {style}"))
            lines.append(Text(_excerpt(passage["text"]) + "\n", style="dim" if kind == "negative" else ""))
    if not found["negatives"]:
        lines.append(Text("no negatives: nothing passed the filters"))
    return Group(*lines)


def _excerpt(text: str) -> str:
    lines = text.strip().splitlines()
    rest = len(lines) - EXCERPT_LINES
    return "\n".join([*lines[:EXCERPT_LINES], *([f"… {rest} more lines"] if rest > 0 else [])])
