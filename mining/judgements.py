"""What the judgements say about the training queries: their positives, and what must never be a candidate."""

from dataclasses import dataclass

import numpy as np

from mining.filters import OwnTexts
from trainer.data.datasets import RetrievalData


@dataclass(frozen=True)
class Judgements:
    """Judgements by training query: row q of every table is the q-th training query."""

    query_rows: np.ndarray  # (Q,) int64 rows of queries.jsonl
    positive_indptr: np.ndarray  # (Q + 1,) int64
    positive_rows: np.ndarray  # corpus rows relevant in the training split
    judged_indptr: np.ndarray  # (Q + 1,) int64
    judged_rows: np.ndarray  # corpus rows relevant in any split
    allowed_N: np.ndarray  # (N,) bool: corpus rows that may be candidates

    @property
    def num_queries(self) -> int:
        return len(self.query_rows)

    @property
    def num_held_out(self) -> int:
        """Passages that are relevant in other splits only, so nothing of an evaluation enters the training."""
        return int((~self.allowed_N).sum())

    def positives(self, places: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return (indptr, corpus rows) of the positives of some queries; each has one."""
        indptr = self.positive_indptr[places.start : places.stop + 1]
        return indptr - indptr[0], self.positive_rows[indptr[0] : indptr[-1]]


def read_judgements(data: RetrievalData, train_split: str) -> Judgements:
    """Return the judgements of the queries that have a positive in the training split."""
    query_rows = data.training_queries(train_split)
    positives = data.positives(query_rows, train_split)
    relevant = [qrels.corpus_rows[qrels.scores > 0] for qrels in data.qrels.values()]
    allowed_N = np.ones(len(data.corpus), bool)
    allowed_N[np.concatenate(relevant)] = False
    train = data.qrels[train_split]
    allowed_N[train.corpus_rows[train.scores > 0]] = True
    return Judgements(query_rows, *positives, *_judged_in_any_split(data, query_rows), allowed_N)


def own_texts(judgements: Judgements, places: slice, passage_key_N: np.ndarray, query_key_Q: np.ndarray) -> OwnTexts:
    """Return what belongs to some of the training queries.

    passage_key_N, query_key_Q: content keys of all passages, and of all training queries.
    """
    start, stop = judgements.judged_indptr[places.start], judgements.judged_indptr[places.stop]
    rows = judgements.judged_rows[start:stop]
    indptr = judgements.judged_indptr[places.start : places.stop + 1] - start
    # Each query's own key stands behind those of its texts.
    keys = np.insert(passage_key_N[rows], indptr[1:], query_key_Q[places])
    return OwnTexts(indptr, rows, indptr + np.arange(len(indptr)), keys)


def _judged_in_any_split(data: RetrievalData, query_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (indptr, corpus rows) of what is relevant to each query in any split."""
    tables = [data.positives(query_rows, split) for split in data.qrels]
    places = np.concatenate([np.repeat(np.arange(len(query_rows)), np.diff(indptr)) for indptr, _ in tables])
    rows = np.concatenate([rows for _, rows in tables])
    pairs = np.unique(places * len(data.corpus) + rows)
    indptr = np.searchsorted(pairs, np.arange(len(query_rows) + 1) * len(data.corpus))
    return indptr, pairs % len(data.corpus)
