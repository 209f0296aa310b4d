"""The forms of sentence-transformers: anchor, positive [, negative, negatives | negative_1, negative_2 …] and scores.

score: any number, label: a whole one, same: 0 or 1; the grade of the positive, which 0 makes a negative.
title: of the positive. candidates: passages that a list of labels divides, in the place of positive.
scores: a teacher's, of the positive and of each negative. A positive and a negative are a text each or a list of them.

Its trainers take one column of scores for labels, and all others for texts.
"""

import re
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
    titled,
)
from trainer.data.row import NUMBERS, TEXTS, Contents, Row

NUMBERED = re.compile(r"negative_(\d+)$")
GRADES = {"score": "any", "label": "whole", "same": "0 and 1"}  # a column, and what it may hold


def parse(record: dict[str, Any]) -> Example:
    """Return an anchor with its positives and its negatives. Source: the column names of sentence-transformers' losses."""
    query = text_of(record, "anchor")
    column = "positive" if "positive" in record else "candidates"
    positives = positives_of(record, column)
    if title := option_of(record, "title"):
        if len(positives) > 1 or positives[0].title_length:
            raise Bad("title of a list", "title stands beside several passages, or one with a title; give each {title, text}")
        positives = [titled(positives[0], title)]
    scored = [name for name in GRADES if record.get(name) is not None]
    for name in scored:
        positives = graded(positives, record, name, GRADES[name])
    if column == "candidates" and isinstance(record[column], list) and not scored:
        sentence = f'{column} is a list without labels; set data.columns = {{positive = "{column}"}} if all are positives'
        raise Bad("no label", sentence)
    passages = positives + _negatives(record)
    if record.get("scores"):
        passages = taught(passages, numbers_of(record, "scores", len(passages), "the positive and the negatives"))
        scored.append("scores")
    elif has_teacher(passages):
        scored.append("score of passages")
    return Example(query, passages, " and ".join(scored), id_of(record, "query_id"), option_of(record, "prompt"))


def write(row: Row, has: Contents) -> Iterator[dict[str, Any]]:
    """Yield one record for each positive, with its query's negatives; scores are a teacher's, or else grades."""
    for place, positive in enumerate(row.positives):
        record: dict[str, Any] = {"anchor": row.query.text, "positive": positive.text}
        record |= {f"negative_{number}": text.text for number, text in enumerate(row.negatives, 1)}
        if has.teacher:
            record["scores"] = [row.positive_teacher[place], *row.teacher]
        elif has.grades:
            record["score"] = row.grades[place]
        yield record


def columns(has: Contents) -> dict[str, pa.DataType]:
    """Return what `write` fills."""
    names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, has.num_negatives + 1))]
    scores = {"scores": NUMBERS} if has.teacher else {"score": pa.float32()} if has.grades else {}
    return {name: pa.string() for name in names} | scores


def write_triplets(row: Row, has: Contents) -> Iterator[dict[str, Any]]:
    """Yield one record for each positive and each negative of a query."""
    for place, positive in enumerate(row.positives):
        for at, negative in enumerate(row.negatives):
            record: dict[str, Any] = {"anchor": row.query.text, "positive": positive.text, "negative": negative.text}
            yield record | ({"scores": [row.positive_teacher[place], row.teacher[at]]} if has.teacher else {})


def triplet_columns(has: Contents) -> dict[str, pa.DataType]:
    """Return what `write_triplets` fills."""
    return dict.fromkeys(("anchor", "positive", "negative"), pa.string()) | ({"scores": NUMBERS} if has.teacher else {})


def write_labeled_pairs(row: Row, has: Contents) -> Iterator[dict[str, Any]]:
    """Yield one record for each passage of a query, with its score, or the label 1 of a positive and 0 of a negative."""
    labels, scores = [1] * len(row.positives) + [0] * len(row.negatives), row.positive_teacher + row.teacher
    for place, passage in enumerate(row.positives + row.negatives):
        told = {"score": scores[place]} if has.teacher else {"label": labels[place]}
        yield {"anchor": row.query.text, "passage": passage.text, **told}


def labeled_pair_columns(has: Contents) -> dict[str, pa.DataType]:
    """Return what `write_labeled_pairs` fills."""
    return {"anchor": pa.string(), "passage": pa.string(), **({"score": pa.float32()} if has.teacher else {"label": pa.int64()})}


def write_labeled_lists(row: Row, has: Contents) -> Iterator[dict[str, Any]]:
    """Yield one record for each positive: a list of it and its query's negatives, with their scores, or labels 1 and 0."""
    for place, positive in enumerate(row.positives):
        scores = {"scores": [row.positive_teacher[place], *row.teacher]}
        told: dict[str, Any] = scores if has.teacher else {"labels": [1] + [0] * len(row.negatives)}
        yield {"anchor": row.query.text, "passages": [passage.text for passage in (positive, *row.negatives)], **told}


def labeled_list_columns(has: Contents) -> dict[str, pa.DataType]:
    """Return what `write_labeled_lists` fills."""
    return {
        "anchor": pa.string(),
        "passages": TEXTS,
        **({"scores": NUMBERS} if has.teacher else {"labels": pa.list_(pa.int64())}),
    }


def _negatives(record: dict[str, Any]) -> list[Passage]:
    names = [name for name in record if name in ("negative", "negatives") or NUMBERED.match(name)]
    names.sort(key=lambda name: int(name.rpartition("_")[2]) if "_" in name else -1)
    # Arrow has a column for every row: null where a row has fewer negatives.
    return [passage for name in names for passage in passages_of(record, name, 0.0)]
