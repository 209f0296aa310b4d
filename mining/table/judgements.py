"""What the judgements say about the training queries: their positives, and what must never be a candidate."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from mining.table.filters import Keys, OwnTexts, some_lists
from trainer.data.datasets import RetrievalData
from trainer.data.texts import first_of_equal


@dataclass(frozen=True)
class Judgements:
    """Judgements by training query: row q of every table is the q-th training query."""

    query_rows: np.ndarray  # (Q,) int64 rows of queries.jsonl
    positive_indptr: np.ndarray  # (Q + 1,) int64
    positive_rows: np.ndarray  # corpus rows relevant in the training split
    positive_grades: np.ndarray  # their grades, float32
    text_of_query: np.ndarray  # (Q,) int64: queries of one text have one number, of T
    judged_indptr: np.ndarray  # (T + 1,) int64
    judged_rows: np.ndarray  # corpus rows relevant, in any split, to any query of a text, and those with such a query's id
    allowed_N: np.ndarray  # (N,) bool: corpus rows that may be candidates

    @property
    def num_queries(self) -> int:
        return len(self.query_rows)

    @property
    def num_held_out(self) -> int:
        """Passages that are relevant in other splits only, so nothing of an evaluation enters the training."""
        return len(self._allowed_before)

    @cached_property
    def _allowed_before(self) -> np.ndarray:
        """How many rows below each one that is held out are allowed, ascending: a few numbers in the place of N."""
        held_out = np.flatnonzero(~self.allowed_N)
        return held_out - np.arange(len(held_out))

    def allowed_rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the corpus rows of the numbers-th allowed passages, counted from 0; -1 where the number is -1."""
        rows = numbers + np.searchsorted(self._allowed_before, numbers, side="right")
        return np.where(numbers < 0, -1, rows)

    def positives(self, places: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return (indptr, corpus rows) of the positives of some queries; each has one."""
        indptr = self.positive_indptr[places.start : places.stop + 1]
        return indptr - indptr[0], self.positive_rows[indptr[0] : indptr[-1]]


def read_judgements(data: RetrievalData, train_split: str) -> Judgements:
    """Return the judgements of the queries that have a positive in the training split."""
    query_rows = data.training_queries(train_split)
    indptr, at = data.positive_judgements(query_rows, train_split)
    relevant = [qrels.corpus_rows[qrels.scores > 0] for qrels in data.qrels.values()]
    allowed_N = np.ones(len(data.corpus), bool)
    allowed_N[np.concatenate(relevant)] = False
    train = data.qrels[train_split]
    allowed_N[train.corpus_rows[train.scores > 0]] = True
    positives = indptr, train.corpus_rows[at], train.scores[at]
    return Judgements(query_rows, *positives, *_judged_by_text(data, query_rows), allowed_N)


def own_texts(judgements: Judgements, places: slice, keys: tuple[Keys, ...], device: torch.device | str = "cpu") -> OwnTexts:
    """Return what belongs to some of the training queries; keys: of all of them."""
    texts, list_of_query = np.unique(judgements.text_of_query[places], return_inverse=True)
    indptr, at = some_lists(judgements.judged_indptr, texts)
    lists, starts, rows = (torch.from_numpy(n).to(device) for n in (list_of_query, indptr, judgements.judged_rows[at]))
    return OwnTexts(lists, starts, rows, tuple(Keys(each.query_Q[places], each.passage_N) for each in keys))


def _judged_by_text(data: RetrievalData, query_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the text of each of the queries, and (indptr, corpus rows) of what is relevant to each text in any split.

    A document with a query's own id is no negative of its text either: as in ArguAna, it is the query itself.
    """
    first, num_passages = first_of_equal(data.text_keys["queries"]), len(data.corpus)
    texts, text_of_query = np.unique(first[query_rows], return_inverse=True)
    relevant = [(first[qrels.query_rows], qrels.corpus_rows, qrels.scores > 0) for qrels in data.qrels.values()]
    has_own = data.own_rows >= 0
    relevant.append((first[has_own], data.own_rows[has_own], np.ones(has_own.sum(), bool)))
    pairs = np.unique(np.concatenate([(text * num_passages + row)[is_relevant] for text, row, is_relevant in relevant]))
    pairs = pairs[np.isin(pairs // num_passages, texts)]
    indptr = np.append(np.searchsorted(pairs, texts * num_passages), len(pairs))
    return text_of_query, indptr, pairs % num_passages
