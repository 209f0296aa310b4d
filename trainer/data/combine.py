"""Several sources as one: their tables one after the other, their rows renumbered.

A passage that two sources have under one id, with the same text, is one passage; queries stay apart, because each has the
prefix, the batch and the loss of its source. An id with two texts is refused.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.judged import ABSENT, JUDGED, save_absent, save_given, save_own, sorted_judgements, write_about
from trainer.data.texts import SCHEMA, RowLookup, batches, key_of, read_table
from trainer.errors import InputError
from trainer.handoff.settings import SourceSettings


class Named(Protocol):
    """A source as its job names it."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> SourceSettings: ...


Parts = Sequence[tuple[Path, Named]]  # the tables of each source


def combine_sources(parts: Parts, folder: Path) -> None:
    """Write the tables of all sources as one data set; raises InputError where one id stands for two texts."""
    passage_rows, first_passages = _combine_side(parts, folder, "corpus", merges=True)
    query_rows, first_queries = _combine_side(parts, folder, "queries", merges=False)
    judged = _combine_qrels(parts, query_rows, passage_rows, folder)
    given = [_given(part, *rows) for (part, _), *rows in zip(parts, query_rows, passage_rows, strict=True)]
    num_queries = sum(len(rows) for rows in query_rows)
    save_given(folder, np.concatenate(given), judged, num_queries)
    save_own(folder, np.concatenate([_own(part, rows) for (part, _), rows in zip(parts, passage_rows, strict=True)]))
    forms = [json.loads((part / "about.json").read_text())["form"] for part, _ in parts]
    write_about(folder, " + ".join(forms), first_rows=list(zip(first_queries, first_passages, strict=True)))


def _combine_side(parts: Parts, folder: Path, side: str, merges: bool) -> tuple[list[np.ndarray], list[int]]:
    """Write one table of all sources' texts; return each source's new row by old row, and its first new row."""
    id_keys, text_keys = np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    new_rows: list[np.ndarray] = []
    first_rows: list[int] = []
    with pa.ipc.new_stream(str(folder / f"{side}.arrow"), SCHEMA) as writer:
        for number, (part, source) in enumerate(parts):
            here, texts = np.load(part / f"{side}-keys.npy")
            if prefix := source.settings.id_prefix:
                here = _prefixed_keys(part / f"{side}.arrow", prefix)
            at = RowLookup(id_keys).find(here)
            known = np.flatnonzero(at >= 0)
            if len(clash := known[text_keys[at[known]] != texts[known]]):
                _refuse_clash(parts, number, side, int(clash[0]), int(at[clash[0]]), first_rows)
            is_new = (at < 0) if merges else np.ones(len(here), bool)
            first_rows.append(len(id_keys))
            new_rows.append(np.where(is_new, len(id_keys) + np.cumsum(is_new) - 1, at))
            id_keys, text_keys = np.append(id_keys, here[is_new]), np.append(text_keys, texts[is_new])
            _copy(part / f"{side}.arrow", prefix, is_new, writer)
    np.save(folder / f"{side}-keys.npy", np.stack([id_keys, text_keys]), allow_pickle=False)
    return new_rows, first_rows


def _prefixed_keys(table: Path, prefix: str) -> np.ndarray:
    keys = (key_of(prefix + row_id) for batch in batches(table) for row_id in batch.column("_id").to_pylist())
    return np.fromiter(keys, np.uint64)


def _copy(table: Path, prefix: str, is_new: np.ndarray, writer: pa.RecordBatchStreamWriter) -> None:
    start = 0
    for batch in batches(table):
        kept = batch.filter(pa.array(is_new[start : start + len(batch)]))
        ids = pc.binary_join_element_wise(prefix, kept.column("_id"), "") if prefix else kept.column("_id")
        writer.write_batch(pa.record_batch([ids, *kept.columns[1:]], schema=SCHEMA))
        start += len(batch)


def _refuse_clash(parts: Parts, number: int, side: str, row: int, earlier_row: int, first_rows: list[int]) -> None:
    part, source = parts[number]
    earlier = parts[int(np.searchsorted(first_rows, earlier_row, side="right")) - 1][1]
    row_id = source.settings.id_prefix + read_table(part / f"{side}.arrow")[row]["_id"]
    what = "query" if side == "queries" else "passage"
    raise InputError(
        f"{earlier.settings.path} and {source.settings.path} have the {what} id {row_id!r} for different texts; "
        f"set sources.{source.name}.id_prefix, to {source.name + '/'!r} for example"
    )


def _combine_qrels(parts: Parts, query_rows: list[np.ndarray], passage_rows: list[np.ndarray], folder: Path) -> list[np.ndarray]:
    """Write the judgements of every split, and return them."""
    found = []
    for name in sorted({file.name for part, _ in parts for file in part.glob("qrels-*.npy")}):
        rows = [
            _renumbered(np.load(part / name), queries, passages)
            for (part, _), queries, passages in zip(parts, query_rows, passage_rows, strict=True)
            if (part / name).exists()
        ]
        found.append(sorted_judgements(np.concatenate(rows)))
        np.save(folder / name, found[-1], allow_pickle=False)
        absent = [
            _absent(part / name.replace("qrels", "absent"), rows) for (part, _), rows in zip(parts, query_rows, strict=True)
        ]
        save_absent(folder, name.removeprefix("qrels-").removesuffix(".npy"), np.concatenate(absent))
    return found


def _absent(path: Path, query_rows: np.ndarray) -> np.ndarray:
    """Return the judgements of one source that name no document, by new rows."""
    found = np.load(path) if path.exists() else np.zeros(0, ABSENT)
    found["query"] = query_rows[found["query"]]
    return found


def _own(part: Path, passage_rows: np.ndarray) -> np.ndarray:
    """Return the new row of the document with the id of each query of one source, -1 where there is none."""
    own = np.load(part / "own.npy")
    return np.where(own < 0, -1, passage_rows[own])


def _given(part: Path, query_rows: np.ndarray, passage_rows: np.ndarray) -> np.ndarray:
    """Return the given negatives of one source by new rows, (n,) JUDGED."""
    if not (part / "given-ids.npy").exists():
        return np.zeros(0, JUDGED)
    indptr, ids, scores = (np.load(part / f"given-{name}.npy") for name in ("indptr", "ids", "scores"))
    found = np.zeros(len(ids), JUDGED)
    found["query"], found["passage"] = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)), ids
    found["teacher"] = scores
    return _renumbered(found, query_rows, passage_rows)


def _renumbered(judged: np.ndarray, query_rows: np.ndarray, passage_rows: np.ndarray) -> np.ndarray:
    found = judged.copy()
    found["query"], found["passage"] = query_rows[judged["query"]], passage_rows[judged["passage"]]
    return found
