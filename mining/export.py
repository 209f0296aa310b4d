"""A version of the negatives as one file for people and other tools: by ids, or with texts in the forms that trainers read.

One batch of queries is in memory at a time. A record has a cross-encoder's scores where there are any, or else, where that is
asked for, the scores by which was mined.

Whoever reads the file may put any negative of a record beside any positive; with filter.positive="each" a query has a record
for each positive.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mining.table.judgements import Judgements
from trainer.data.datasets import RetrievalData
from trainer.data.groups import BATCH, Group, read_rows
from trainer.data.record_file import FORMS as TRAINED_FORMS
from trainer.data.record_file import Form, plan_negatives, say_counts, write_records
from trainer.data.row import NUMBERS, TEXTS, Contents, Row
from trainer.data.survey import Survey, say_lost
from trainer.errors import InputError
from trainer.handoff.beside import made_whole
from trainer.handoff.negatives import Negatives


def write_negatives(
    out: Path, form: str, data: RetrievalData, judgements: Judgements, negatives: Negatives, scores: bool = False
) -> dict[str, Any]:
    """Write a version in one of FORMS; return how many records, and sentences on what is left out.

    scores: write those of the encoder, where there are none of a cross-encoder; without it labeled forms have labels.
    Raises InputError if the disk refuses, and for scores of BM25's.
    """
    if scores and form != "ids":
        negatives = _taught_by_itself(negatives)
    is_apart = form != "labeled-pair"  # where a negative stands beside no positive
    survey = Survey(data)
    num_negatives = plan_negatives(survey.look(_blocks(judgements, negatives, is_apart)), FORMS[form])
    has = survey.contents(FORMS[form], num_negatives)
    has = replace(has, teacher=has.teacher and (scores or form not in LABELED))
    with made_whole(out) as beside:
        counts = write_records(beside, FORMS[form], has, data, _blocks(judgements, negatives, is_apart))
    lost = {} if form == "ids" else survey.lost(FORMS[form], num_negatives)
    said = [*say_counts(counts, FORMS[form]), *say_lost(lost, FORMS[form].title), *survey.warnings(FORMS[form])]
    return {"records": counts.records, "left_out": counts.left_out, "cut": counts.cut, "said": said}


def by_ids(row: Row, has: Contents) -> Iterator[dict[str, Any]]:
    """Yield one record a query, ids only; the texts are in the data set. BM25 has no scores of positives."""
    record: dict[str, Any] = {"query_id": row.query.id, "positive_ids": [text.id for text in row.positives]}
    record |= {"negative_ids": [text.id for text in row.negatives]}
    record |= {"positive_scores": row.positive_scores, "negative_scores": row.scores}
    if has.teacher:
        record |= {"positive_teacher_scores": row.positive_teacher, "negative_teacher_scores": row.teacher}
    yield record


def id_columns(has: Contents) -> dict[str, pa.DataType]:
    """Return what `by_ids` fills."""
    columns: dict[str, pa.DataType] = {"query_id": pa.string(), "positive_ids": TEXTS, "negative_ids": TEXTS}
    columns |= {"positive_scores": NUMBERS, "negative_scores": NUMBERS}
    return columns | (dict.fromkeys(("positive_teacher_scores", "negative_teacher_scores"), NUMBERS) if has.teacher else {})


FORMS = {"ids": Form("ids", by_ids, id_columns, "any"), **TRAINED_FORMS}
LABELED = ("labeled-pair", "labeled-list")  # whose one column of numbers has labels, unless scores are asked for


def no_scores() -> InputError:
    """Return why BM25's scores are not written."""
    return InputError("BM25 gives a positive no score, so there are none to write; leave out --scores, or mine with a model")


def _taught_by_itself(negatives: Negatives) -> Negatives:
    """Return the negatives with the scores by which they were mined as a teacher's, where there are no others."""
    if negatives.teacher_scores is not None:
        return negatives
    if negatives.positive_scores is None:
        raise no_scores()
    return replace(negatives, teacher_scores=negatives.scores, positive_teacher_scores=negatives.positive_scores)


def mined_row(data: RetrievalData, judgements: Judgements, negatives: Negatives, place: int) -> Row:
    """Return the place-th training query with all its positives and all its negatives."""
    return read_rows(data, _groups(judgements, negatives, slice(place, place + 1), is_apart=False))[0]


def _blocks(judgements: Judgements, negatives: Negatives, is_apart: bool) -> Iterator[list[Group]]:
    for start in range(0, judgements.num_queries, BATCH):
        yield _groups(judgements, negatives, slice(start, min(start + BATCH, judgements.num_queries)), is_apart)


def _groups(judgements: Judgements, negatives: Negatives, places: slice, is_apart: bool) -> list[Group]:
    """Return some training queries.

    is_apart: where negatives keep margins to each positive by itself, a group for each positive, with what it admits.
    """
    found = []
    for place in range(places.start, places.stop):
        own = np.arange(*judgements.positive_indptr[place : place + 2])
        drawn = np.arange(*negatives.indptr[place : place + 2])
        for at_positive, at in _pairs(negatives, own, drawn) if is_apart else [(own, drawn)]:
            found.append(
                Group(
                    int(judgements.query_rows[place]),
                    judgements.positive_rows[at_positive],
                    negatives.ids[at],
                    judgements.positive_grades[at_positive],
                    _known(negatives.positive_teacher_scores, at_positive),
                    _known(negatives.teacher_scores, at),
                    negatives.scores[at],
                    None if negatives.positive_scores is None else negatives.positive_scores[at_positive],
                )
            )
    return found


def _pairs(negatives: Negatives, at_positive: np.ndarray, at: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return which positives of a query stand together, with which negatives, by where they stand in the tables."""
    if negatives.margins is None:
        return [(at_positive, at)]
    return [(one, at[negatives.admit(at, one)]) for one in at_positive[:, None]]


def _known(scores: np.ndarray | None, at: np.ndarray) -> np.ndarray:
    """Return some scores; NaN where there are none."""
    return np.full(len(at), np.nan, np.float32) if scores is None else scores[at]
