"""One training query with its positives and its negatives, for a person to judge."""

import difflib
from typing import Any

import numpy as np

from mining.export import mined_row
from mining.table.judgements import Judgements
from trainer.data.datasets import RetrievalData
from trainer.data.row import Entry
from trainer.errors import InputError
from trainer.handoff.negatives import Negatives

NEAR = 3  # ids that are named in place of one that is not there


def show_query(data: RetrievalData, judgements: Judgements, negatives: Negatives, asked: str) -> dict[str, Any]:
    """Return what a version has for a query: texts, ids and scores, best first; raises InputError if there is no such query.

    asked: its id, or its exact text.
    """
    place = find_query(data, judgements, asked)
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


def find_query(data: RetrievalData, judgements: Judgements, asked: str) -> int:
    """Return which training query has an id or a text; raises InputError if none has."""
    places = np.flatnonzero(np.isin(judgements.query_rows, rows_of(data, asked)))
    if len(places) == 0:
        raise InputError(f"query {asked!r} has no positive in the training split, so nothing is mined for it")
    return int(places[0])


def rows_of(data: RetrievalData, asked: str) -> list[int]:
    """Return the row of the query with an id, or the rows of those with exactly this text; raises InputError if there is none."""
    ids = data.queries["_id"][:]
    if asked in ids:
        return [ids.index(asked)]
    text = asked.strip()
    if same := [row for row, each in enumerate(data.queries["text"][:]) if each.strip() == text]:
        return same
    near = _near(asked, ids)
    meant = f"; near to it: {', '.join(near)}" if near else ""
    raise InputError(f"{data.path} has no query {asked!r}; expected the id of a query or its exact text{meant}")


def _near(asked: str, known: list[str]) -> list[str]:
    """Return the ids that look like one that is not there."""
    # Looking through all ids of a large data set for near ones takes minutes: those of about its length first.
    alike = sorted(known, key=lambda each: (abs(len(each) - len(asked)), each[:1] != asked[:1]))[:20_000]
    return difflib.get_close_matches(asked, alike, n=NEAR)


def _passages(texts: list[Entry], scores: list[float] | None, teacher: list[float] | None) -> list[dict[str, Any]]:
    columns = {"score": scores, "teacher_score": teacher}
    known = {name: values for name, values in columns.items() if values is not None}
    passages: list[dict[str, Any]] = [
        {"id": text.id, **{name: values[place] for name, values in known.items()}, "text": text.text}
        for place, text in enumerate(texts)
    ]
    order = np.argsort([-passage.get("score", 0.0) for passage in passages], kind="stable")
    return [passages[place] for place in order]
