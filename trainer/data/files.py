"""The files of a data set, record by record: JSON lines, JSON, CSV and TSV, each packed or not, Parquet and Arrow.

A record comes with its number, the line or the row, so that every problem has a place. One batch is in memory at a time.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.delimited import DELIMITED, read_delimited
from trainer.data.lines import read_lines
from trainer.data.problems import PACKED, Problem, Report, first_byte

BATCH = 1000  # rows of Parquet and Arrow read at once
SUFFIXES = (*(kind + packed for packed in ("", *PACKED) for kind in (".jsonl", ".json")), ".parquet", ".arrow", *DELIMITED)
KINDS = ".jsonl, .json, .parquet, .arrow, .csv or .tsv, packed (.gz, .bz2, .xz, .zst) or not"  # the same for people

Record = tuple[int, dict[str, Any]]


def read_records(path: Path, report: Report, named: Collection[str] = ()) -> Iterator[Record]:
    """Yield (number, record) of the sound records of a file; the number of a line or row, from 1.

    named: columns that are expected, by numbers where a CSV or TSV file does not name its columns.
    """
    if path.name.endswith(DELIMITED):
        yield from read_delimited(path, report, named)
    elif path.suffix in (".parquet", ".arrow"):
        yield from _table_records(path, report)
    elif first_byte(path) == b"[":
        yield from _array_records(path, report)
    else:
        yield from read_objects(path, report)


def read_objects(path: Path, report: Report) -> Iterator[Record]:
    """Yield (line, object) of the sound lines of a file of JSON lines."""
    for number, line in read_lines(path, report):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
            report(Problem(path, number, "does not parse", f"this line is not JSON: {where}"))
            continue
        if ("\\ud" in line or "\\uD" in line) and not _is_unicode(record):
            report(Problem(path, number, "not UTF-8", "half a surrogate pair (\\ud800 to \\udfff) stands alone in this line"))
        elif isinstance(record, dict):
            yield number, record
        else:
            report(Problem(path, number, "not an object", 'expected an object such as {"_id": "1", "text": "…"}'))


def _is_unicode(record: Any) -> bool:
    """Return whether UTF-8 can hold a record: JSON can spell halves of surrogate pairs, which it cannot."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _array_records(path: Path, report: Report) -> Iterator[Record]:
    """Yield the objects of one JSON array, read at once, with their places in it."""
    text = "\n".join(line for _, line in read_lines(path, report))
    try:
        records = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        report(Problem(path, 0, "does not parse", f"this file is not JSON: {error}; JSON lines are read, too"))
        return
    for number, record in enumerate(records, 1):
        if isinstance(record, dict):
            yield number, record
        else:
            report(Problem(path, number, "not an object", "this item is no object; expected columns by name"))


def _table_records(path: Path, report: Report) -> Iterator[Record]:
    number = 0
    try:
        for batch in _batches(path):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = "Parquet" if path.suffix == ".parquet" else "Arrow"
        reason = str(error).splitlines()[0]
        kind, after = ("ends early", f" after row {number}") if number else ("does not parse", "")
        report(Problem(path, 0, kind, f"this file is no whole {what} file{after}: {reason}; write or copy it anew"))


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(BATCH)
        return
    with pa.memory_map(str(path)) as source:
        for batch in _arrow_batches(source):
            for start in range(0, len(batch), BATCH):
                yield batch.slice(start, BATCH)


def _arrow_batches(source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    """Yield the batches of Arrow's stream, as `datasets` writes it, or of its file, as polars and Feather do."""
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if not is_file:
        yield from pa.ipc.open_stream(source)
        return
    file = pa.ipc.open_file(source)
    for number in range(file.num_record_batches):
        yield file.get_batch(number)
