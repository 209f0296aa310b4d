"""One training query with its positives and its negatives, for a person to judge."""

import difflib
from typing import Any

import numpy as np

from mining.export import mined_row
from mining.judgements import Judgements
from trainer.data.datasets import RetrievalData
from trainer.data.row import Entry
from trainer.errors import InputError
from trainer.handoff.negatives import Negatives

NEAR = 3  # ids that are named in place of one that is not there


def show_query(data: RetrievalData, judgements: Judgements, negatives: Negatives, query_id: str) -> dict[str, Any]:
    """Return what a version has for a query: texts, ids and scores, best first; raises InputError with ids near to it."""
    place = find_query(data, judgements, query_id)
    row = mined_row(data, judgements, negatives, place)
    has_teacher = negatives.teacher_scores is not None
    at = slice(judgements.positive_indptr[place], judgements.positive_indptr[place + 1])
    positive_scores = None if negatives.positive_scores is None else [round(float(s), 6) for s in negatives.positive_scores[at]]
    manifest = negatives.manifest
    return {
        "query_id": row.query.id,
        "query": row.query.text,
        "version": negatives.version,
        "source": manifest.get("source"),
        "checkpoint_step": negatives.checkpoint_step,
        **({} if negatives.clusters is None else {"cluster": int(negatives.clusters[place])}),
        "positives": _passages(row.positives, positive_scores, row.positive_teacher if has_teacher else None),
        "negatives": _passages(row.negatives, row.scores, row.teacher if has_teacher else None),
    }


def find_query(data: RetrievalData, judgements: Judgements, query_id: str) -> int:
    """Return which training query has an id; raises InputError if none has."""
    training_ids = data.queries.select(judgements.query_rows)["_id"][:]
    if query_id in training_ids:
        return training_ids.index(query_id)
    if query_id in data.queries["_id"][:]:
        raise InputError(f"query {query_id!r} has no positive in the training split, so nothing is mined for it")
    raise InputError(f"there is no training query {query_id!r}; near to it: {', '.join(near_ids(query_id, training_ids))}")


def near_ids(asked: str, known: list[str]) -> list[str]:
    """Return the ids that look most like one that is not there."""
    # Looking through all ids of a large data set for near ones takes minutes: those of about its length first.
    alike = sorted(known, key=lambda each: (abs(len(each) - len(asked)), each[:1] != asked[:1]))[:20_000]
    return difflib.get_close_matches(asked, alike, n=NEAR, cutoff=0.3) or known[:NEAR]


def _passages(texts: list[Entry], scores: list[float] | None, teacher: list[float] | None) -> list[dict[str, Any]]:
    columns = {"score": scores, "teacher_score": teacher}
    known = {name: values for name, values in columns.items() if values is not None}
    passages: list[dict[str, Any]] = [
        {"id": text.id, **{name: values[place] for name, values in known.items()}, "text": text.text}
        for place, text in enumerate(texts)
    ]
    order = np.argsort([-passage.get("score", 0.0) for passage in passages], kind="stable")
    return [passages[place] for place in order]
