"""Tables of text, line by line: TSV as MS MARCO and TREC write it, without quotes, and CSV with them."""

import csv
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from trainer.data.lines import read_lines
from trainer.data.problems import Problem, Report

SUFFIXES = (".tsv", ".csv", ".txt", ".trec", ".qrels", ".qrel")


def read_cells(path: Path, report: Report) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of a table of text: a line of TSV is split at its tabs, one without tabs at its spaces."""
    if ".csv" in path.suffixes:
        for number, cells in quoted_rows(path, report):
            yield number, [cell.strip() for cell in cells]
        return
    has_tabs = None
    for number, line in read_lines(path, report):
        has_tabs = "\t" in line if has_tabs is None else has_tabs
        yield number, [cell.strip() for cell in line.split("\t")] if has_tabs else line.split()


def quoted_rows(path: Path, report: Report) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, cells) of the rows of a CSV file or of TSV with quotes; a cell may hold lines of its own."""
    csv.field_size_limit(sys.maxsize)
    last = 0

    def lines() -> Iterator[str]:
        nonlocal last
        for number, line in read_lines(path, report, keeps_blank=True):
            last = number
            yield line + "\n"

    source = lines()
    head = next(source, "")
    delimiter = "\t" if ".tsv" in path.suffixes else max(",;\t", key=head.count)
    start = 1
    try:
        for cells in csv.reader(itertools.chain([head], source), delimiter=delimiter, strict=True):
            if any(cells):
                yield start, cells
            start = last + 1
    except csv.Error as error:
        remedy = "double the quotes in a cell and put it in quotes, or save the data as JSON lines"
        report(Problem(path, start, "does not parse", f"the row that begins here is not CSV: {error}; {remedy}"))


def unquoted(cell: str) -> str:
    """Return a cell of TSV without the quotes that spreadsheets put around one."""
    inner = cell[1:-1]
    is_quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else cell
