"""The form of FlagEmbedding: query, pos, neg, lists of texts [, pos_scores, neg_scores] [, pos_id, neg_id, id] [, type]
[, prompt: stands before the query].
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from trainer.data.example import (
    Bad,
    Example,
    Passage,
    graded,
    has_teacher,
    id_of,
    numbers_of,
    option_of,
    passages_of,
    positives_of,
    taught,
    text_of,
)
from trainer.data.row import NUMBERS, TEXTS, Contents, Row


def parse(record: dict[str, Any]) -> Example:
    """Return a query with its positives and negatives. Source: FlagEmbedding's fine-tuning data."""
    query = text_of(record, "query")
    sides = {
        "pos": _with_ids(positives_of(record, "pos"), record, "pos_id"),
        "neg": _with_ids(passages_of(record, "neg", 0.0), record, "neg_id"),
    }
    scored = [f"{column}_scores" for column in sides if record.get(f"{column}_scores") not in (None, [])]
    if scored:
        for column, passages in sides.items():
            if passages or f"{column}_scores" in scored:
                sides[column] = taught(passages, numbers_of(record, f"{column}_scores", len(passages), column))
        scored = ["pos_scores and neg_scores"]
    elif has_teacher(sides["pos"] + sides["neg"]):
        scored = ["score of passages"]
    for name, allowed in (("score", "any"), ("label", "whole")):
        if record.get(name) is not None:
            sides["pos"] = graded(sides["pos"], record, name, allowed)
            scored.append(name)
    about = id_of(record, "id"), option_of(record, "prompt"), option_of(record, "type")
    return Example(query, sides["pos"] + sides["neg"], " and ".join(scored), *about)


def write(row: Row, has: Contents) -> Iterator[dict[str, Any]]:
    """Yield one record a query, with prompt, type and ids under the names of FlagEmbedding's own files.

    Its readers take a null for the word None, so where other queries have a prompt, an empty one stands for none; likewise
    "normal", FlagEmbedding's own default, for a type.
    """
    sides = {"pos": row.positives, "neg": row.negatives}
    record: dict[str, Any] = {"query": row.query.text}
    record |= {name: [passage.text for passage in passages] for name, passages in sides.items()}
    if has.teacher:
        record |= {"pos_scores": row.positive_teacher, "neg_scores": row.teacher}
    if has.prompts:
        record["prompt"] = row.query.prompt or ""
    if has.types:
        record["type"] = row.query.type or "normal"
    yield record | {f"{name}_id": [passage.id for passage in passages] for name, passages in sides.items()} | {"id": row.query.id}


def columns(has: Contents) -> dict[str, pa.DataType]:
    """Return what `write` fills."""
    types = {"query": pa.string(), "pos": TEXTS, "neg": TEXTS, "pos_scores": NUMBERS, "neg_scores": NUMBERS}
    types |= {"prompt": pa.string(), "type": pa.string(), "pos_id": TEXTS, "neg_id": TEXTS, "id": pa.string()}
    is_there = {"pos_scores": has.teacher, "neg_scores": has.teacher, "prompt": has.prompts, "type": has.types}
    return {name: kind for name, kind in types.items() if is_there.get(name, True)}


def _with_ids(passages: list[Passage], record: dict[str, Any], column: str) -> list[Passage]:
    """Return passages with the ids of a column, where it has any."""
    values = record.get(column)
    if values is None or values == []:
        return passages
    values = values if isinstance(values, list) else [values]
    if len(values) != len(passages):
        raise Bad(f"{column} is no list", f"{column} is {len(values)} long; expected an id for each of {len(passages)} texts")
    ids = [id_of({column: value}, column) for value in values]
    return [passage._replace(id=own or passage.id) for passage, own in zip(passages, ids, strict=True)]
