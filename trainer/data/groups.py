"""Queries of the tables with passages that may stand together in a record: by numbers first, then with their texts.

The numbers may be read several times, which is cheap; texts are read for some queries at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.datasets import RetrievalData
from trainer.data.row import Entry, Row
from trainer.data.texts import SCHEMA

BATCH = 1000  # queries whose texts are in memory at once


@dataclass(frozen=True)
class Group:
    """A query with passages that may stand together, by rows of the tables; scores are float32."""

    query: int
    positives: np.ndarray  # (p,) int64 corpus rows
    negatives: np.ndarray  # (n,) int64 corpus rows
    grades: np.ndarray  # (p,) of the positives
    positive_teacher: np.ndarray  # (p,) a teacher's scores, NaN where there are none
    teacher: np.ndarray  # (n,) of the negatives
    scores: np.ndarray | None = None  # (n,) the miner's, of the negatives
    positive_scores: np.ndarray | None = None  # (p,) the miner's, of the positives


def read_rows(data: RetrievalData, groups: Sequence[Group]) -> list[Row]:
    """Return some groups with their texts."""
    needed = np.unique(np.concatenate([np.zeros(0, np.int64), *(rows for g in groups for rows in (g.positives, g.negatives))]))
    passages = entries(data, "corpus", needed)
    queries = entries(data, "queries", np.array([group.query for group in groups], np.int64))
    return [
        Row(
            query,
            [passages[i] for i in np.searchsorted(needed, group.positives)],
            [passages[i] for i in np.searchsorted(needed, group.negatives)],
            numbers(group.grades),
            numbers(group.positive_teacher),
            numbers(group.teacher),
            [] if group.scores is None else numbers(group.scores),
            [] if group.positive_scores is None else numbers(group.positive_scores),
        )
        for query, group in zip(queries, groups, strict=True)
    ]


def entries(data: RetrievalData, side: str, rows: np.ndarray) -> list[Entry]:
    """Return the texts of some rows of "corpus" or "queries"."""
    table = (data.corpus if side == "corpus" else data.queries)[rows]
    return [Entry(*columns) for columns in zip(*(table[name] for name in SCHEMA.names), strict=True)]


def judged_groups(data: RetrievalData, split: str) -> Iterator[list[Group]]:
    """Yield the queries with a positive in a split, in file order, some at a time, with the negatives that the data set names."""
    query_rows, qrels = data.training_queries(split), data.qrels[split]
    for start in range(0, len(query_rows), BATCH):
        block = query_rows[start : start + BATCH]
        indptr, at = data.positive_judgements(block, split)
        found = []
        for place, query in enumerate(block.tolist()):
            own = at[indptr[place] : indptr[place + 1]]
            given, teacher = _given(data, query)
            found.append(Group(query, qrels.corpus_rows[own], given, qrels.scores[own], qrels.teacher[own], teacher))
        yield found


def numbers(scores: np.ndarray) -> list[float]:
    """Return float32 as the shortest decimals that are read back as the same."""
    return [float(str(score)) for score in scores]


def _given(data: RetrievalData, query: int) -> tuple[np.ndarray, np.ndarray]:
    if data.given is None:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    at = slice(data.given.indptr[query], data.given.indptr[query + 1])
    return data.given.ids[at], data.given.scores[at]
