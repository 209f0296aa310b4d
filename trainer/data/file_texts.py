"""The texts of one file in its order, row by row: lines of a plain file, or a column of records.

Nothing is left out or joined, so rows keep their numbers: an empty text counts as a text, and ids may repeat. A query's own
prompt (FlagEmbedding's column) stands in the place of the prefix, as in a data set.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from trainer.data.cache import build_once, cache_folder, file_digest
from trainer.data.files import KINDS, SUFFIXES, read_lines, read_records
from trainer.data.problems import Problem, Refusal, Report
from trainer.data.texts import read_table
from trainer.errors import InputError

log = logging.getLogger(__name__)

FORMAT = 1  # of the table below; another number reads the file again
PLAIN = (".txt", ".txt.gz")
FILES = (*PLAIN, *SUFFIXES)
IDS = ("_id", "id", "docid", "doc_id", "query_id", "qid", "pid")
COLUMNS = {  # of a text, what is looked for first
    "query": ("text", "query", "question", "anchor"),
    "passage": ("text", "passage", "contents", "content", "body", "document", "positive", "answer"),
}
BATCH = 1000  # texts written at once
SCHEMA = pa.schema([("_id", pa.string()), ("text", pa.string()), ("prompt", pa.string())])
Row = tuple[str, str, str | None]  # the columns of SCHEMA
HOW = "--columns text=NAME names the column of the texts, and _id=NAME that of their ids"


def read_texts_of(path: Path, side: str, columns: Mapping[str, str], cache: Path | None) -> datasets.Dataset:
    """Return the texts of a file with the columns of SCHEMA, memory-mapped; raises InputError with file and line.

    side: "query" or "passage", for the name of the column. columns: as data.columns has them, for "text" and "_id".
    A text without an id has the number of its line or row for one, from 1.
    """
    if not path.name.endswith(FILES):
        raise InputError(f"{path} is no file of texts: expected a text on each line (.txt), or records ({KINDS})")
    cache = cache_folder(cache)
    depends_on = [FORMAT, file_digest(path, cache), path.suffixes, side, dict(columns)]
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()

    def build(folder: Path) -> None:
        report = Refusal()
        rows = _lines(path, report) if path.name.endswith(PLAIN) else _column(path, side, columns, report)
        _write(folder / "texts.arrow", rows)

    texts = read_table(build_once(cache / f"file-{digest[:24]}", f"texts of {path}", build) / "texts.arrow")
    if not len(texts):
        raise InputError(f"{path} holds no text")
    return texts


def _lines(path: Path, report: Report) -> Iterator[Row]:
    """Yield (number, text) of every line; those that are blank and followed by others are empty texts."""
    before = 0
    for number, line in read_lines(path, report):
        yield from ((str(blank), "", None) for blank in range(before + 1, number))
        yield str(number), line, None
        before = number


def _column(path: Path, side: str, columns: Mapping[str, str], report: Report) -> Iterator[Row]:
    text_column = id_column = None
    for number, record in read_records(path, report):
        if text_column is None:
            text_column, id_column = _find_columns(path, side, columns, record)
        try:
            text, title = record[text_column], record.get("title") if text_column == "text" else None
        except KeyError:
            report(Problem(path, number, "no text", f"the column {text_column} is missing; expected one in every record"))
            continue
        if not isinstance(text, str | None) or not isinstance(title, str | None):
            report(Problem(path, number, "no text", f"{text_column} is {text!r}; expected a text; {HOW}"))
        prompt = record.get("prompt") if side == "query" else None
        if not isinstance(prompt, str | None):
            report(Problem(path, number, "no prompt", f"prompt is {prompt!r}; expected a text, or none"))
        own = None if id_column is None else record.get(id_column)
        yield str(number if own is None else own), " ".join(part for part in (title, text) if part), prompt


def _find_columns(path: Path, side: str, columns: Mapping[str, str], record: dict[str, Any]) -> tuple[str, str | None]:
    """Return the columns of texts and of ids by what the first record has; raises InputError where that is not clear."""
    for name in columns.values():
        if name not in record:
            raise InputError(f"{path} has no column {name}, only {', '.join(record)}; {HOW}")
    id_column = columns.get("_id") or next((name for name in IDS if name in record), None)
    texts = [name for name, value in record.items() if isinstance(value, str) and name not in (id_column, "title")]
    found = columns.get("text") or next((name for name in COLUMNS[side] if name in record), None)
    if found is None and len(texts) != 1:
        raise InputError(
            f"{path} has the columns {', '.join(record)}, and none of them is known as that of a {side}'s text; {HOW}"
        )
    return found or texts[0], id_column


def _write(path: Path, rows: Iterator[Row]) -> None:
    batch: list[Row] = []

    def flush() -> None:
        writer.write_batch(pa.record_batch([pa.array(column, pa.string()) for column in zip(*batch, strict=True)], schema=SCHEMA))
        batch.clear()

    with pa.ipc.new_stream(str(path), SCHEMA) as writer:
        for row in rows:
            batch.append(row)
            if len(batch) == BATCH:
                flush()
        if batch:
            flush()
