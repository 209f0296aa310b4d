"""A version of the negatives as one file for people and other tools: by ids, or with texts in the forms that trainers read.

Written beside and renamed into place, so a file is whole or absent. One batch of queries is in memory at a time. Whoever reads
it may put any negative of a record beside any positive; with filter.positive="each" a query has a record for each positive.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mining.judgements import Judgements
from trainer.data.datasets import RetrievalData
from trainer.errors import InputError
from trainer.handoff.manifest import is_disk_full
from trainer.handoff.negatives import Negatives

SUFFIXES = (".jsonl", ".parquet")
BATCH = 1000  # queries whose texts are in memory at once

Record = dict[str, Any]
TEXTS, NUMBERS = pa.list_(pa.string()), pa.list_(pa.float32())


@dataclass(frozen=True)
class Texts:
    """A text with its id."""

    id: str
    text: str


@dataclass(frozen=True)
class Row:
    """One query with its passages, and their scores; teacher's: None where there is no cross-encoder."""

    query: Texts
    positives: list[Texts]
    negatives: list[Texts]
    scores: list[float]
    positive_teacher: list[float] | None
    teacher: list[float] | None


def refuse_file(out: Path) -> None:
    """Raise InputError if a file cannot be made there."""
    if not out.name.endswith(SUFFIXES):
        raise InputError(f"--out {out} is no {' or '.join(SUFFIXES)}; end the file's name with one of them")
    if out.exists():
        raise InputError(f"{out} is there already; give --out a new file, or delete that one")


def write_negatives(out: Path, form: str, data: RetrievalData, judgements: Judgements, negatives: Negatives) -> int:
    """Write a version in one of FORMS and return the number of records; raises InputError if the disk refuses."""
    records = FORMS[form](_rows(data, judgements, negatives))
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".parquet":
            num_records = _write_parquet(beside, records, _schema(form, negatives))
        else:
            num_records = _write_json_lines(beside, records)
        os.replace(beside, out)
    except (OSError, pa.ArrowException) as error:
        reason = "no room is left on the disk" if is_disk_full(error) else getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {out}: {reason}; give --out another file") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
    return num_records


def by_ids(rows: Iterator[Row]) -> Iterator[Record]:
    """Yield one record a query, ids only; the texts are in the data set."""
    for row in rows:
        record: Record = {"query_id": row.query.id, "positive_ids": [text.id for text in row.positives]}
        record |= {"negative_ids": [text.id for text in row.negatives], "negative_scores": row.scores}
        if row.teacher is not None:
            record |= {"positive_teacher_scores": row.positive_teacher, "negative_teacher_scores": row.teacher}
        yield record


def sentence_transformers(rows: Iterator[Row]) -> Iterator[Record]:
    """Yield one record for each positive: anchor, positive, negative_1, …"""
    for row in rows:
        for number, positive in enumerate(row.positives):
            record: Record = {"anchor": row.query.text, "positive": positive.text}
            record |= {f"negative_{place}": text.text for place, text in enumerate(row.negatives, 1)}
            if row.teacher is not None and row.positive_teacher is not None:
                record["scores"] = [row.positive_teacher[number], *row.teacher]
            yield record


def tevatron(rows: Iterator[Row]) -> Iterator[Record]:
    """Yield one record a query: lists of passages with docid, title and text; title and text are one in our tables."""

    def passages(texts: list[Texts], teacher: list[float] | None) -> list[Record]:
        return [
            {"docid": text.id, "title": "", "text": text.text, **({} if teacher is None else {"score": teacher[place]})}
            for place, text in enumerate(texts)
        ]

    for row in rows:
        record: Record = {"query_id": row.query.id, "query": row.query.text}
        record["positive_passages"] = passages(row.positives, row.positive_teacher)
        record["negative_passages"] = passages(row.negatives, row.teacher)
        yield record


def flagembedding(rows: Iterator[Row]) -> Iterator[Record]:
    """Yield one record a query: lists of texts."""
    for row in rows:
        record: Record = {"query": row.query.text}
        record |= {"pos": [text.text for text in row.positives], "neg": [text.text for text in row.negatives]}
        if row.teacher is not None:
            record |= {"pos_scores": row.positive_teacher, "neg_scores": row.teacher}
        yield record


FORMS: dict[str, Callable[[Iterator[Row]], Iterator[Record]]] = {
    "ids": by_ids,
    "sentence-transformers": sentence_transformers,
    "tevatron": tevatron,
    "flagembedding": flagembedding,
}


def read_rows(data: RetrievalData, judgements: Judgements, negatives: Negatives, places: slice, apart: bool = False) -> list[Row]:
    """Return some training queries with their texts.

    apart: where negatives keep margins to each positive by itself, a row for each positive, with what it admits.
    """
    indptr, positive_rows = judgements.positives(places)
    start, stop = negatives.indptr[places.start], negatives.indptr[places.stop]
    starts, negative_rows = np.asarray(negatives.indptr[places.start : places.stop + 1]) - start, negatives.ids[start:stop]
    queries = data.queries.select(judgements.query_rows[places])
    needed = np.union1d(positive_rows, negative_rows)
    table = data.corpus.select(needed)
    texts = [Texts(*pair) for pair in zip(table["_id"], table["text"], strict=True)]
    rows, first = [], judgements.positive_indptr[places.start]
    for place, (query_id, query) in enumerate(zip(queries["_id"], queries["text"], strict=True)):
        own, drawn = np.arange(*indptr[place : place + 2]), np.arange(*starts[place : place + 2])
        pairs = _pairs(negatives, own + first, drawn + start) if apart else [(own + first, drawn + start)]
        for at_positive, at in pairs:
            rows.append(
                Row(
                    Texts(query_id, query),
                    [texts[i] for i in np.searchsorted(needed, positive_rows[at_positive - first])],
                    [texts[i] for i in np.searchsorted(needed, negative_rows[at - start])],
                    _numbers(negatives.scores[at]),
                    _known_numbers(negatives.positive_teacher_scores, at_positive),
                    _known_numbers(negatives.teacher_scores, at),
                )
            )
    return rows


def _pairs(negatives: Negatives, at_positive: np.ndarray, at: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return which positives of a query stand together, with which negatives, by where they stand in the tables."""
    if negatives.margins is None:
        return [(at_positive, at)]
    return [(one, at[negatives.admit(at, one)]) for one in at_positive[:, None]]


def _rows(data: RetrievalData, judgements: Judgements, negatives: Negatives) -> Iterator[Row]:
    for start in range(0, judgements.num_queries, BATCH):
        places = slice(start, min(start + BATCH, judgements.num_queries))
        yield from read_rows(data, judgements, negatives, places, apart=True)


def _numbers(scores: np.ndarray) -> list[float]:
    return [round(float(score), 6) for score in scores]


def _known_numbers(scores: np.ndarray | None, at: np.ndarray) -> list[float] | None:
    return None if scores is None else _numbers(scores[at])


def _write_json_lines(path: Path, records: Iterator[Record]) -> int:
    num_records = 0
    with open(path, "w", encoding="utf-8") as file:
        for num_records, record in enumerate(records, 1):  # noqa: B007
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return num_records


def _write_parquet(path: Path, records: Iterator[Record], schema: pa.Schema) -> int:
    num_records = 0
    with pq.ParquetWriter(path, schema) as writer:
        batch: list[Record] = []
        for num_records, record in enumerate(records, 1):  # noqa: B007
            batch.append(record)
            if len(batch) == BATCH:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        writer.write_table(pa.Table.from_pylist(batch, schema))
    return num_records


def _schema(form: str, negatives: Negatives) -> pa.Schema:
    has_teacher = negatives.teacher_scores is not None
    if form == "ids":
        columns = {"query_id": pa.string(), "positive_ids": TEXTS, "negative_ids": TEXTS, "negative_scores": NUMBERS}
        columns |= {"positive_teacher_scores": NUMBERS, "negative_teacher_scores": NUMBERS} if has_teacher else {}
    elif form == "sentence-transformers":
        longest = int(np.diff(negatives.indptr).max(initial=0))
        names = ["anchor", "positive", *(f"negative_{place}" for place in range(1, longest + 1))]
        columns = {name: pa.string() for name in names} | ({"scores": NUMBERS} if has_teacher else {})
    elif form == "tevatron":
        fields = [(name, pa.string()) for name in ("docid", "title", "text")]
        passages = pa.list_(pa.struct([*fields, *([("score", pa.float32())] if has_teacher else [])]))
        columns = {"query_id": pa.string(), "query": pa.string(), "positive_passages": passages, "negative_passages": passages}
    else:
        columns = {"query": pa.string(), "pos": TEXTS, "neg": TEXTS}
        columns |= {"pos_scores": NUMBERS, "neg_scores": NUMBERS} if has_teacher else {}
    return pa.schema(columns.items())
