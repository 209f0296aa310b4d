"""The form of Tevatron: query_id, query, positive_passages, negative_passages, lists of {docid, title, text [, score]}."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from trainer.data.example import Example, has_teacher, id_of, option_of, passages_of, positives_of, text_of
from trainer.data.row import Contents, Entry, Row


def parse(record: dict[str, Any]) -> Example:
    """Return a query with its positive and negative passages. Source: Tevatron's training data."""
    query = text_of(record, "query")
    passages = positives_of(record, "positive_passages") + passages_of(record, "negative_passages", 0.0)
    scored = "score of passages" if has_teacher(passages) else ""
    return Example(query, passages, scored, id_of(record, "query_id"), option_of(record, "prompt"))


def write(row: Row, has: Contents) -> Iterator[dict[str, Any]]:
    """Yield one record a query, titles apart. What Tevatron does not know it does not read: prompt, and grades as labels."""
    record: dict[str, Any] = {"query_id": row.query.id, "query": row.query.text}
    record |= {"prompt": row.query.prompt} if has.prompts else {}
    positives, negatives = _objects_of(row.positives), _objects_of(row.negatives)
    for passages, scores in ((positives, row.positive_teacher), (negatives, row.teacher)):
        for passage, score in zip(passages, scores if has.teacher else [], strict=has.teacher):
            passage["score"] = score
    for passage, grade in zip(positives, row.grades if has.grades else [], strict=has.grades):
        passage["label"] = grade
    yield record | {"positive_passages": positives, "negative_passages": negatives}


def columns(has: Contents) -> dict[str, pa.DataType]:
    """Return what `write` fills."""
    fields = {"docid": pa.string(), "title": pa.string(), "text": pa.string(), **({"score": pa.float32()} if has.teacher else {})}
    labelled = fields | ({"label": pa.float32()} if has.grades else {})
    passages = {"positive_passages": _list_of(labelled), "negative_passages": _list_of(fields)}
    return {"query_id": pa.string(), "query": pa.string(), **({"prompt": pa.string()} if has.prompts else {}), **passages}


def _objects_of(entries: list[Entry]) -> list[dict[str, Any]]:
    parts = [(entry.id, *entry.title_and_rest()) for entry in entries]
    return [dict(zip(("docid", "title", "text"), part, strict=True)) for part in parts]


def _list_of(fields: dict[str, pa.DataType]) -> pa.DataType:
    return pa.list_(pa.struct(list(fields.items())))
