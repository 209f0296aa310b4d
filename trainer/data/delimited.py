"""Records of CSV and TSV files, row by row: commas, tabs or semicolons, cells in quotes as pandas writes them.

The first line names the columns. A file without such a line is read where data.columns gives columns by their numbers from
"0"; so are the three columns of MS MARCO's triples of texts, whose cells have no quotes.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from trainer.data.cells import quoted_rows
from trainer.data.lines import read_lines
from trainer.data.problems import PACKED, Problem, Report

DELIMITED = tuple(kind + packed for packed in ("", *PACKED) for kind in (".csv", ".tsv"))
TRIPLE = ["query", "positive", "negative"]


def read_delimited(path: Path, report: Report, named: Collection[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line on which it begins, record) of the rows of a file; an empty cell is None. named: columns that are expected."""
    is_triple = "triple" in path.name.lower() and _has_texts(path)
    header = TRIPLE if is_triple else None
    for number, cells in _raw_rows(path, report) if is_triple else quoted_rows(path, report):
        if header is None:
            by_number = bool(named) and all(name.isdigit() for name in named) and not {*named} <= {*cells}
            header = [str(place) for place in range(len(cells))] if by_number else [cell.strip() for cell in cells]
            if len({*header}) < len(header):
                report(Problem(path, number, "unknown columns", "two columns have one name; give each its own"))
                return
            if not by_number:
                continue
        if len(cells) == len(header):
            yield number, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        else:
            expected = f"expected {len(header)} as in the first line; put a cell with a delimiter in quotes"
            report(Problem(path, number, "wrong columns", f"found {len(cells)} cells, {expected}"))


def _has_texts(path: Path) -> bool:
    """Return whether the first line has three cells, of which the second is a text and not a name or an id."""
    _, cells = next(_raw_rows(path, _ignore), (0, []))
    return len(cells) == len(TRIPLE) and " " in cells[1]


def _raw_rows(path: Path, report: Report) -> Iterator[tuple[int, list[str]]]:
    for number, line in read_lines(path, report):
        yield number, line.split("\t")


def _ignore(problem: Problem) -> None:
    """Ignore the problem here; the code that reads the file for its rows reports it."""
