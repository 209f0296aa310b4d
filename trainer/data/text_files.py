"""The texts of one side of a collection with their ids, from any file: JSON lines, Parquet, Arrow, TSV, CSV."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.cells import SUFFIXES, read_cells, unquoted
from trainer.data.example import Bad
from trainer.data.files import Record, read_records
from trainer.data.headings import Headings, is_heading
from trainer.data.problems import PACKED, Problem, Report, near_names
from trainer.data.texts import Written

# Of tables without a line of names, by how many columns they have. Source: MS MARCO's passages, queries and documents.
WITHOUT_NAMES = {2: ("_id", "text"), 4: ("_id", "url", "title", "text")}


def read_texts(file: Path, side: str, headings: Headings, report: Report, is_shared: bool) -> Iterator[tuple[int, str, Written]]:
    """Yield (line, id, text) of the sound records of a file; text is title and text, joined.

    A text that is empty is left out as a blemish.
    side: "corpus" or "queries".
    is_shared: other columns of the file are read elsewhere.
    """
    columns: dict[str, str] | None = None
    names: tuple[str, ...] = ()
    for number, record in _records(file, side, headings, report):
        try:
            if columns is None or tuple(record) != names:
                names, is_first = tuple(record), columns is None
                columns = headings.find(names, side)
                if is_first:  # its columns are those of the file, and one that is not there is missing everywhere
                    headings.need(["_id", "text"], columns, names)
                has_more = not is_shared and len(names) > len(columns)
            if has_more:
                headings.tell_unused(file, number, record, columns.values())
            row_id, written = _id_of(record, columns), _text_of(record, columns)
        except Bad as bad:
            report(Problem(file, number, bad.kind, str(bad)))
            if bad.kind == "unknown columns":
                return
            continue
        if written.text:
            yield number, row_id, written
        else:
            sentence = f"the text of {row_id!r} is empty, so it is left out as if it were not there"
            report(Problem(file, number, "empty text", sentence, is_blemish=True))


def _records(file: Path, side: str, headings: Headings, report: Report) -> Iterator[Record]:
    """Yield the records of a file, also of a table of text, with or without a line of names."""
    if not is_table_of_text(file):
        yield from read_records(file, report)
        return
    names: tuple[str, ...] | None = None
    is_named = False
    for number, cells in read_cells(file, report):
        if names is None:
            is_named = is_heading(cells, headings.mapped, side)
            names = tuple(cells) if is_named else WITHOUT_NAMES.get(len(cells))
            if names is None:
                sentence = f"found {len(cells)} columns without names; expected id and text, separated by a tab, or a first "
                report(Problem(file, number, "wrong columns", sentence + "line that names the columns, as _id, title, text"))
                return
            if is_named:
                continue
        while len(cells) > len(names) and not cells[-1]:
            cells.pop()
        if len(cells) == len(names):
            yield number, dict(zip(names, map(unquoted, cells) if is_named else cells, strict=True))
        else:
            found = f"found {len(cells)} columns; expected {len(names)} as in the first line ({', '.join(names)})"
            sentence = f"{found}; a text with tabs or several lines can stand in JSON lines, Parquet or CSV"
            report(Problem(file, number, "wrong columns", sentence))


def is_table_of_text(file: Path) -> bool:
    """Return whether a file, compressed or not, is TSV, CSV or the like by its name."""
    return file.name.removesuffix(file.suffix if file.suffix in PACKED else "").endswith(SUFFIXES)


def _id_of(record: dict[str, Any], columns: dict[str, str]) -> str:
    """Return the id of a record; raises Bad."""
    column = columns.get("_id", "_id")
    value = name_of(record.get(column))
    if value:
        return value
    if record.get(column) == "":
        raise Bad("empty id", f"{column} is empty; every text needs an id of its own")
    raise _no_string(column, record)


def name_of(value: Any) -> str | None:
    """Return an id as text; None if it is neither text nor a whole number, which pandas may have written as 12.0."""
    if type(value) is str:
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def _text_of(record: dict[str, Any], columns: dict[str, str]) -> Written:
    if "text" not in columns:
        raise _no_string("text", record)
    title, text, prompt = [_string(record, columns.get(name)) for name in ("title", "text", "prompt")]
    joined = f"{title} {text}".strip()
    title_length = len(title.lstrip()) if text.strip() else len(joined)
    has_prompt = "prompt" in columns and isinstance(record[columns["prompt"]], str)  # an empty one is no prefix
    return Written(joined, prompt if has_prompt else None, None, title_length if title.strip() else 0)


def _string(record: dict[str, Any], column: str | None) -> str:
    """Return a text of a record, empty where it is null; raises Bad."""
    value = None if column is None else record[column]
    if type(value) is str:
        return value
    if value is None or value != value:  # null, as pandas writes it, too
        return ""
    raise _no_string(str(column), record)


def _no_string(column: str, record: dict[str, Any]) -> Bad:
    found = f"is {record[column]!r}" if column in record else "is missing"
    return Bad(f"{column} is no string", f"{column} {found}; expected a string{near_names(column, record.keys() - {column})}")
