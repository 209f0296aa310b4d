"""Tables of text, line by line: TSV as MS MARCO and TREC write it, without quotes, and CSV with them."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from trainer.data.files import read_lines
from trainer.data.problems import Problem, Report

SUFFIXES = (".tsv", ".csv", ".txt", ".trec", ".qrels", ".qrel")


def read_cells(path: Path, report: Report) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of a table of text: a line of TSV is split at its tabs, one without tabs at its spaces."""
    if ".csv" in path.suffixes:
        yield from _quoted_cells(path, report)
        return
    has_tabs = None
    for number, line in read_lines(path, report):
        has_tabs = "\t" in line if has_tabs is None else has_tabs
        yield number, [cell.strip() for cell in line.split("\t")] if has_tabs else line.split()


def _quoted_cells(path: Path, report: Report) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, cells) of the rows of a CSV file, whose cells may hold lines of their own."""
    csv.field_size_limit(sys.maxsize)
    last = 0

    def lines() -> Iterator[str]:
        nonlocal last
        for number, line in read_lines(path, report, keeps_blank=True):
            last = number
            yield line + "\n"

    source = lines()
    head = next(source, "")
    delimiter = max(",;\t", key=head.count)
    start = 1
    try:
        for cells in csv.reader(_chained(head, source), delimiter=delimiter, strict=True):
            if any(cells):
                yield start, [cell.strip() for cell in cells]
            start = last + 1
    except csv.Error as error:
        report(Problem(path, start, "does not parse", f"the row that begins here is not CSV: {error}"))


def _chained(head: str, rest: Iterator[str]) -> Iterator[str]:
    yield head
    yield from rest


def unquoted(cell: str) -> str:
    """Return a cell of TSV without the quotes that spreadsheets put around one."""
    inner = cell[1:-1]
    is_quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else cell
