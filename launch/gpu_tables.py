"""What `negpool bench gpu` found, as one table."""

from typing import Any

from launch.counted import counted
from launch.tables import Part, Sheet, machine_words


def gpu_parts(found: dict[str, Any]) -> list[Part]:
    """Return a row for each figure, what was wanted beside it, and a sentence on how many reach that."""
    title = f"{machine_words(found)}, {found['precision']}, medians of {found['rounds']}, {found['seconds']:.0f} s in all"
    rows = [_row(row) for row in found["rows"]]
    compared = [row for row in found["rows"] if row["wanted"] is not None]
    reached = sum(reaches(row) for row in compared)
    said = f"{reached} of {counted(len(compared), 'figure')} with a wanted one reach it."
    return [Sheet(title, ("", "figure", "wanted", "about"), rows), said]


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    if row["found"] is None:
        return row["what"], "", _wanted(row), f"{row['unit']}: {row['word']}".removeprefix(": ")
    return row["what"], _figure(row["found"]), _wanted(row), ", ".join(filter(None, (row["unit"], row["word"])))


def reaches(row: dict[str, Any]) -> bool:
    """Return whether a figure is as good as the wanted one."""
    if row["found"] is None:
        return False
    return row["found"] <= row["wanted"] if row["less_is_better"] else row["found"] >= row["wanted"]


def _wanted(row: dict[str, Any]) -> str:
    return "" if row["wanted"] is None else ("<= " if row["less_is_better"] else ">= ") + _figure(row["wanted"])


def _figure(value: float) -> str:
    """Return a figure with three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
