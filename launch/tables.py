"""What `negpool check` and `negpool bench` found, as tables for a terminal and for Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from launch.counted import counted


@dataclass(frozen=True)
class Sheet:
    """A table of text; the first column says what a row is about."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def numbers(self, column: str) -> list[float]:
        """Return a column's values."""
        return [float(row[self.columns.index(column)]) for row in self.rows]


LEFT = ("", "found", "about", "settings", "type", "default")  # columns of words
Part = Sheet | str  # a table or a sentence


def as_text(parts: Sequence[Part]) -> Group:
    """Return what rich prints."""
    return Group(*(Text(part) if isinstance(part, str) else _rich(part) for part in parts))


def as_markdown(parts: Sequence[Part]) -> str:
    """Return the same as Markdown."""
    return "\n".join(f"{part}\n" if isinstance(part, str) else _markdown(part) for part in parts)


def check_parts(found: dict[str, Any]) -> list[Part]:
    """Return the variants, one a row, the groups of the worst of them, and two sentences."""
    offload = ", offload" if found["offload"] else ""
    title = (
        f"{found['model']}, {counted(found['queries'], 'query')}, {counted(found['ranks'], 'rank')}, {found['backend']}{offload}"
    )
    columns = ("", "ratio off by", "cosine", "chunks", "GiB", "tokens/s a rank", "padding", "twice")
    forms = {
        "max_ratio_error": ".1e",
        "min_cosine": ".7f",
        "chunks": "d",
        "peak_memory_gib": ".2f",
        "tokens_per_rank_per_s": ",",
        "share_padding": ".1%",
        "share_encoded_twice": ".0%",
    }
    rows = [
        (name, *(format(row[key], form) if key in row else "" for key, form in forms.items()))
        for name, row in found["variants"].items()
    ]
    compared = {name: row for name, row in found["variants"].items() if "groups" in row}
    worst = max(compared, key=lambda name: compared[name]["max_ratio_error"])
    groups = [(name, f"{row['ratio']:.6f}", f"{row['cosine']:.7f}") for name, row in compared[worst]["groups"].items()]
    calls = ", ".join(f"{count} {name}" for name, count in found["collectives"].items()) or "none"
    follow = "whatever the number of chunks" if found["collectives_do_not_follow_chunks"] else "more with more chunks"
    return [
        Sheet(title, columns, rows),
        Sheet(f"by group of parameters: {worst}", ("", "ratio", "cosine"), groups),
        f"Collectives of a step: {calls}; {follow}. Compared in {'TensorFloat-32' if found['tf32'] else 'float32'}.",
        "The gradients are exact." if found["ok"] else "The gradients are NOT those of the reference.",
    ]


def step_parts(found: dict[str, Any]) -> list[Part]:
    """Return everybody's step, ours against a plain one, and memory against the batch."""
    title = (
        f"{found['pairs_per_rank']} pairs a rank, {counted(found['ranks'], 'rank')}, texts up to {found['max_tokens']} tokens, "
        f"{found['precision']}, {machine_words(found)}, medians of {found['rounds']}"
    )
    parts: list[Part] = [_times(title, found["steps"])]
    if against := found.get("against_plain"):
        parts.append(_times(f"against a plain step, {against['pairs']} pairs", against["steps"]))
    if memory := found.get("memory"):
        title = f"memory against the batch, texts up to {memory['max_tokens']} tokens"
        rows = [(f"{pairs:,} pairs", f"{gib:.3f}") for pairs, gib in zip(memory["pairs"], memory["peak_gib"], strict=True)]
        parts += [Sheet(title, ("", "peak GiB"), rows), f"Ratio of the peaks, embeddings aside: {memory['ratio']:.2f}."]
    parts.append(rate_words(found["precision"], found["matmul_gflops"]))
    if found.get("gradient_cosine") is not None:
        parts.append(f"Both gradients without dropout: cosine {found['gradient_cosine']:.6f}.")
    return parts + _peer_parts(found) if "peer_trials" in found else parts


def _peer_parts(found: dict[str, Any]) -> list[Part]:
    """Return the settings that the peer was tried with, and the one it ran with."""
    rows = [(name, "out of memory" if seconds is None else f"{seconds:.2f}") for name, seconds in found["peer_trials"].items()]
    setting, does_run = found["peer_setting"], "sentence-transformers" in found["steps"]
    said = "The peer is left out: it does not fit into memory."
    if setting and does_run:
        said = "The peer ran at its best: " + ", ".join(f"{key}={value}" for key, value in setting.items()) + "."
    return [Sheet("settings of the peer, tried on a part of the batch", ("", "seconds of a step"), rows), said]


def rate_words(precision: str, gflops: float) -> str:
    """Return the rate that shares are of, and in which numbers."""
    return f"A large matrix product in {precision} runs at {gflops:,.0f} GFLOP/s on this machine."


def doctor_parts(found: dict[str, Any]) -> list[Part]:
    """Return all findings, then what to do about those that are not ok."""
    rows = [(line["name"], line["verdict"], line["found"]) for line in found["findings"]]
    to_do = [f"{line['name']}: {line['remedy']}" for line in found["findings"] if line["remedy"]]
    needed = [line["name"] for line in found["findings"] if line["verdict"] in ("missing", "wrong")]
    last = f"To be mended: {', '.join(needed)}." if needed else "All that is needed is there."
    return [Sheet("this machine", ("", "", "found"), rows), *to_do, last]


def _times(title: str, rows: dict[str, dict[str, float]]) -> Sheet:
    cells = []
    for name, row in rows.items():
        share = row.get("share_of_matmul_rate")
        cells.append(
            (name, f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", f"{row['peak_gib']:.2f}", f"{share:.0%}" if share else "")
        )
    return Sheet(title, ("", "seconds", "ratio", "peak GiB", "of matmul rate"), cells)


def machine_words(found: dict[str, Any]) -> str:
    """Return the device, and how many threads of it."""
    return found["device"] + (f", {counted(found['threads'], 'thread')}" if "threads" in found else "")


def _rich(sheet: Sheet) -> Table:
    table = Table(title=Text(sheet.title), title_justify="left")
    for number, column in enumerate(sheet.columns):
        table.add_column(column, justify="left" if number == 0 or column in LEFT else "right")
    for row in sheet.rows:
        table.add_row(*map(Text, row))
    return table


def _markdown(sheet: Sheet) -> str:
    lines = [sheet.columns, ("---", *["---:"] * (len(sheet.columns) - 1)), *sheet.rows]
    return f"**{sheet.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
