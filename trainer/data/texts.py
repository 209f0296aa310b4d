"""Texts of one side on their way into Arrow: written as they come, told apart by 64-bit keys.

Ids and texts are never held in memory: eight bytes of key for each, and eight for its place in the files. So ten million
texts pass through some hundred megabytes. Two of ten million keys are equal by chance once in 400,000 data sets.
"""

import array
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from trainer.data.problems import Problem, Report, has_rows, place_of

if TYPE_CHECKING:
    import datasets

BATCH = 10_000  # texts written at once
PLACE_BITS = 40  # of the number of a line or row; the file stands above
# prompt: what stands before the text when it is encoded, in the place of the prefix of all; null: none of its own.
# type: FlagEmbedding's name of a query's task. title_length: characters of the text that are its title, a space behind them.
SCHEMA = pa.schema(
    [("_id", pa.string()), ("text", pa.string()), ("prompt", pa.string()), ("type", pa.string()), ("title_length", pa.int32())]
)


class Written(NamedTuple):
    """A text as the table holds it: the columns of SCHEMA behind the id."""

    text: str
    prompt: str | None = None
    type: str | None = None
    title_length: int = 0


class TextWriter:
    """The texts of one side, written to an Arrow file as they come."""

    def __init__(self, out: Path):
        self.out = out
        self.id_keys, self.text_keys, self.places = (array.array("Q") for _ in range(3))
        self.has_id = array.array("b")  # whether the file gives the text an id
        self._prompt_keys = array.array("I")  # 0: no prompt of its own
        self._files: list[Path] = []
        self._rows: list[tuple] = []
        self._table: datasets.Dataset | None = None  # once it is written
        self._writer = pa.ipc.new_stream(str(out), SCHEMA)

    def add(self, file: Path, number: int, row_id: str | None, text: "str | Written") -> int:
        """Write a text and return which it is, from 0; a text without id has its content's digest for one, prompt included."""
        written = Written(text) if isinstance(text, str) else text
        text, prompt = written.text, written.prompt
        encoded = text.encode()
        made_id = xxhash.xxh3_128_hexdigest(encoded if prompt is None else f"{prompt}\0{text}".encode())
        # An id that we made, and that came back in a file that we wrote, does not count as given by the user.
        self.has_id.append(row_id not in (None, made_id))
        row_id = row_id or made_id
        if not self._files or self._files[-1] is not file:
            self._files.append(file)
        self.id_keys.append(key_of(row_id))
        self.text_keys.append(xxhash.xxh3_64_intdigest(encoded))
        self._prompt_keys.append(0 if prompt is None else xxhash.xxh32_intdigest(prompt.encode()) or 1)
        self.places.append((len(self._files) - 1) << PLACE_BITS | number)
        self._rows.append((row_id, *written))
        if len(self._rows) == BATCH:
            self._flush()
        return len(self.id_keys) - 1

    def settle(self, report: Report, may_repeat: bool) -> np.ndarray:
        """Finish the file with one row for each id and return the row of every text that was added, int64.

        may_repeat: an id may come again with the same text and prompt; if not, that is a blemish, but in another file. An id
        with two texts is a problem.
        """
        self._flush()
        self._writer.close()
        keys = np.array(self.id_keys, np.uint64)
        first = first_of_equal(keys)
        repeated = np.flatnonzero(first != np.arange(len(keys)))
        texts, prompts = np.array(self.text_keys, np.uint64), np.array(self._prompt_keys)
        is_other = np.any([each[repeated] != each[first[repeated]] for each in (texts, prompts)], axis=0)
        for again in repeated[is_other | (not may_repeat)]:
            self._report_repeated(int(first[again]), int(again), report, may_repeat)
        is_first = first == np.arange(len(keys))
        if not is_first.all():
            keep_rows(self.out, is_first)
        kept = np.stack([keys[is_first], texts[is_first]])
        np.save(self.out.with_name(f"{self.out.stem}-keys.npy"), kept, allow_pickle=False)
        self.given_id_keys = np.where(np.array(self.has_id, bool)[is_first], kept[0], 0)
        return (np.cumsum(is_first) - 1)[first]

    def own_rows(self, passages: "TextWriter") -> np.ndarray:
        """Return the row among settled passages that has the id of each row here, int64, -1; ids that we made do not count."""
        ids = self.given_id_keys
        return np.where(ids == 0, -1, RowLookup(passages.given_id_keys).find(ids))

    def place(self, index: int) -> tuple[Path, int]:
        """Return the file and the number that a text came from."""
        place = self.places[index]
        return self._files[place >> PLACE_BITS], place & ((1 << PLACE_BITS) - 1)

    def _flush(self) -> None:
        if self._rows:
            columns = [pa.array(column, field.type) for column, field in zip(zip(*self._rows, strict=True), SCHEMA, strict=True)]
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            self._rows = []

    def _report_repeated(self, first: int, again: int, report: Report, may_repeat: bool) -> None:
        (file, number), (earlier_file, earlier) = self.place(again), self.place(first)
        is_equal = all(keys[again] == keys[first] for keys in (self.text_keys, self._prompt_keys))
        if is_equal and file != earlier_file:
            return
        self._table = self._table or read_table(self.out)
        row_id = self._table[again]["_id"]
        word = "row" if has_rows(file) else "line"
        where = f"{word} {earlier}" if earlier_file == file else place_of(earlier_file, earlier)
        if is_equal:
            sentence = f"_id {row_id!r} stands on {where} already, with the same text; it is read once"
            report(Problem(file, number, "text given twice", sentence, is_blemish=True))
        elif may_repeat:
            what = "text" if self.text_keys[first] != self.text_keys[again] else "prompt"
            without = ', or set data.columns = {query_id = ""} to leave them out' if self.out.stem == "queries" else ""
            sentence = f"id {row_id!r} has another {what} than at {where}; give equal ids to equal texts alone{without}"
            report(Problem(file, number, "two texts of an id", sentence))
        else:
            report(Problem(file, number, "duplicate id", f"_id {row_id!r} stands on {where} already; ids must differ"))


def key_of(row_id: str) -> int:
    """Return the 64-bit key of an id."""
    return xxhash.xxh3_64_intdigest(row_id.encode())


def read_table(path: Path) -> "datasets.Dataset":
    """Return a table of ids and texts, memory-mapped."""
    import datasets  # a second, which those who only look at names of files should not pay

    return datasets.Dataset.from_file(str(path))


def batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a table, memory-mapped."""
    with pa.memory_map(str(path)) as source:
        yield from pa.ipc.open_stream(source)


def prompts_digest(path: Path) -> bytes:
    """Return a digest of the prompts of a table with their rows; nothing if no text has one of its own."""
    digest, start, has_any = xxhash.xxh3_128(), 0, False
    for batch in batches(path):
        prompts = batch.column("prompt")
        if prompts.null_count < len(prompts):
            has_any = True
            digest.update(json.dumps([start, prompts.to_pylist()]).encode())
        start += len(batch)
    return digest.digest() if has_any else b""


def keep_rows(path: Path, is_kept: np.ndarray) -> None:
    """Write a table anew with some of its rows."""
    rest = path.with_suffix(".rest")
    start = 0
    with pa.ipc.new_stream(str(rest), SCHEMA) as writer:
        for batch in batches(path):
            writer.write_batch(batch.filter(pa.array(is_kept[start : start + len(batch)])))
            start += len(batch)
    os.replace(rest, path)


def first_of_equal(keys: np.ndarray) -> np.ndarray:
    """Return where the first of all keys that equal each one stands, int64."""
    order = np.argsort(keys, kind="stable")
    is_new = np.ones(len(keys), bool)
    is_new[1:] = keys[order[1:]] != keys[order[:-1]]
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(is_new, np.arange(len(keys)), 0))]
    return first


def join_keys(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return keys of n things that are equal where either of their two keys is, and along chains of such, (n,) int64."""
    groups = [np.unique(each, return_inverse=True)[1] for each in (keys, others)]
    first, before = np.arange(len(keys)), None
    while before is None or (first != before).any():
        before = first
        for group in groups:
            first_of_group = np.full(group.max(initial=-1) + 1, len(keys))
            np.minimum.at(first_of_group, group, first)
            first = first_of_group[group]
    return keys[first]


class RowLookup:
    """From keys of ids to rows, by a sorted array."""

    def __init__(self, id_keys: np.ndarray):
        self._order = np.argsort(id_keys, kind="stable")
        self._sorted = id_keys[self._order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the row of each key, int64, -1 where there is none."""
        if not len(self._sorted):
            return np.full(len(keys), -1, np.int64)
        at = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        return np.where(self._sorted[at] == keys, self._order[at], -1).astype(np.int64)
