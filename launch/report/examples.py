"""Some training queries with their positives and the negatives mined for them, with scores, for a person to judge."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.jobfile import read_job
from mining.export import mined_row
from mining.offline import Mined, read_mined
from trainer.data.row import Entry

NUM_QUERIES, NUM_POSITIVES, NUM_NEGATIVES, NUM_LINES, NUM_CHARACTERS = 8, 3, 4, 6, 600
SCORED_BY = {"bm25": "BM25's, of common words", "model": "the model's"}


@dataclass(frozen=True)
class Examples:
    """Queries of one version of the negatives."""

    version: int
    scores: str  # whose they are
    queries: list[dict[str, Any]]


def read_examples(run: Path) -> Examples:
    """Return queries spread evenly over the newest version; raises InputError if there is nothing to show, saying why."""
    mined = read_mined(read_job(run / "job.toml", [f"run.folder={run}"]).mine)
    have = np.flatnonzero(np.diff(mined.negatives.indptr))
    places = have[np.linspace(0, len(have) - 1, min(NUM_QUERIES, len(have))).astype(np.int64)].tolist()
    scores = SCORED_BY.get(str(mined.negatives.manifest.get("source")), "the miner's")
    return Examples(mined.negatives.version, scores, [_example(mined, place) for place in places])


def _example(mined: Mined, place: int) -> dict[str, Any]:
    row = mined_row(mined.data, mined.judgements, mined.negatives, place)
    own = slice(*mined.judgements.positive_indptr[place : place + 2])
    known = mined.negatives.positive_scores
    positives = _best_first(row.positives, [None] * len(row.positives) if known is None else known[own].tolist())
    return {
        "query": excerpt(row.query),
        "positives": positives[:NUM_POSITIVES],
        "more_positives": len(positives[NUM_POSITIVES:]),
        "negatives": _best_first(row.negatives, row.scores)[:NUM_NEGATIVES],
    }


def _best_first(texts: list[Entry], scores: list[Any]) -> list[dict[str, Any]]:
    passages = [{"id": text.id, "score": score, **excerpt(text)} for text, score in zip(texts, scores, strict=True)]
    return sorted(passages, key=lambda passage: -(passage["score"] or 0.0))


def excerpt(text: Entry) -> dict[str, Any]:
    """Return the title and the beginning of a text, and whether its lines are indented, as those of code are."""
    title, rest = text.title_and_rest()
    lines = rest.splitlines()
    kept = "\n".join(lines[:NUM_LINES])[:NUM_CHARACTERS]
    is_cut = len(kept) < len(rest.rstrip())
    is_indented = any(line.startswith(("  ", "\t")) for line in lines[1:])
    return {"title": title, "text": kept.rstrip() + (" …" if is_cut else ""), "is_indented": is_indented}
