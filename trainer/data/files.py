"""The files of a data set, record by record: JSON lines, JSON, either compressed, Parquet and Arrow.

A record comes with its number, the line or the row, so that every problem has a place. One batch is in memory at a time.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.problems import UNPACKING, Problem, Report, first_byte, open_plain

BATCH = 1000  # rows of Parquet and Arrow read at once
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".arrow")

Record = tuple[int, dict[str, Any]]


def read_records(path: Path, report: Report) -> Iterator[Record]:
    """Yield (number, record) of the sound records of a file; the number of a line or row, from 1."""
    if path.suffix in (".parquet", ".arrow"):
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


def read_lines(path: Path, report: Report, keeps_blank: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of the lines that are UTF-8, without their ends; blank ones only where asked for."""
    try:
        with open_plain(path) as file:
            for number, raw in enumerate(file, 1):
                if number == 1:
                    if what := next((what for start, what in NO_TEXT.items() if raw.startswith(start)), None):
                        report(Problem(path, 0, "no text", f"this file is {what}, and no text; unpack it, or end its name so"))
                        return
                    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        sentence = "this file is UTF-16; convert it to UTF-8: iconv -f utf-16 -t utf-8 FILE > NEW"
                        report(Problem(path, 0, "not UTF-8", sentence))
                        return
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                line = _decoded(path, number, raw, report)
                if line is not None and (keeps_blank or line.strip()):
                    yield number, line
    except UNPACKING as error:
        report(_damaged(path, error))
    except OSError as error:
        unread = f"this file cannot be read ({error.strerror}); a data set needs it"
        report(Problem(path, 0, "missing", unread) if error.strerror else _damaged(path, error))


# What files begin with that are named as if they were text.
NO_TEXT = {b"\x1f\x8b": "a .gz", b"BZh9": "a .bz2", b"\xfd7zXZ": "an .xz", b"\x28\xb5\x2f\xfd": "a .zst"}
NO_TEXT |= {b"PK\x03\x04": "a .zip", b"PAR1": "a .parquet"}


def _decoded(path: Path, number: int, raw: bytes, report: Report) -> str | None:
    """Return a line as text, None if it is none."""
    try:
        line = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        sentence = f"byte {error.start + 1} of this line is not UTF-8; convert the file: iconv -f latin1 -t utf-8 FILE > NEW"
        report(Problem(path, number, "not UTF-8", sentence))
        return None
    if "\0" in line:
        report(Problem(path, number, "no text", "this line holds bytes of zero, so the file is no text in UTF-8; convert it"))
        return None
    return line


def _damaged(path: Path, error: Exception) -> Problem:
    what = "gzip file" if path.suffix == ".gz" else f"{path.suffix} file"
    return Problem(path, 0, "ends early", f"this {what} is cut off or damaged ({error}); copy it anew")


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
        for batch in pa.ipc.open_stream(source):
            for start in range(0, len(batch), BATCH):
                yield batch.slice(start, BATCH)
