"""Which documents have a word and what each such pair is worth; the best documents of a query, without looking at all.

A query's rare words decide which documents are looked at: those that have only words which together cannot reach the k-th best
score are never touched (MaxScore: Turtle and Flood 1995). What remains is scored anew, word by word in the query's order, so no
bit of a score depends on what was left out, nor on which documents are in this part of the corpus.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

WORK_QUERIES = 64  # that a thread searches before it tells
ROUNDING = 2.0**-22  # relative, for each number of a sum: more than two float32 sums of positive numbers differ by
FEW = 4  # times k: so few documents are scored as they are
TINY = np.finfo(np.float32).tiny  # less than any weight

Query = tuple[np.ndarray, np.ndarray]  # its words, int32, each once; how often it has each, float32
Found = tuple[np.ndarray, np.ndarray]  # scores, float32, best first; documents, int32


@dataclass(frozen=True)
class Postings:
    """The documents of each of V words, in CSR form. Memory: 8 bytes for each pair of word and document."""

    num_docs: int
    indptr: np.ndarray  # (V + 1,)
    docs: np.ndarray  # (n,) int32, ascending within a word
    weights: np.ndarray  # (n,) float32, above 0: what the word adds to the score of the document

    def of(self, word: int) -> slice:
        """Return where a word's documents stand."""
        return slice(self.indptr[word], self.indptr[word + 1])

    def most_weights(self) -> np.ndarray:
        """Return the largest weight of each word, (V,) float32; 0 for words of no document."""
        most_V, known = np.zeros(len(self.indptr) - 1, np.float32), np.flatnonzero(np.diff(self.indptr))
        if len(known):
            most_V[known] = np.maximum.reduceat(self.weights, self.indptr[known])
        return most_V

    def kth_weights(self, k: int) -> np.ndarray:
        """Return the k-th largest weight of each word, (V,) float32; 0 for words of fewer documents."""
        kth_V = np.zeros(len(self.indptr) - 1, np.float32)
        for word in np.flatnonzero(np.diff(self.indptr) >= k).tolist():
            kth_V[word] = np.partition(self.weights[self.of(word)], -k)[-k]
        return kth_V

    def score(self, query: Query, docs_n: np.ndarray) -> np.ndarray:
        """Return the scores of some documents, (n,) float32; 0: no common word. docs_n: int32, fastest if they ascend."""
        scores_n = np.zeros(len(docs_n), np.float32)
        for word, times in zip(*query, strict=True):
            scores_n += times * self.weights_in(word, docs_n)
        return scores_n

    def weights_in(self, word: int, docs_n: np.ndarray) -> np.ndarray:
        """Return what a word is worth in some documents, (n,) float32; 0 where it is not."""
        at = self.of(word)
        here = self.docs[at]
        if len(here) == 0:
            return np.zeros(len(docs_n), np.float32)
        place_n = np.minimum(np.searchsorted(here, docs_n), len(here) - 1)
        return np.where(here[place_n] == docs_n, self.weights[at][place_n], np.float32(0))


@dataclass
class Search:
    """The k best documents of queries, from some postings."""

    postings: Postings
    k: int
    most_V: np.ndarray = field(init=False)  # the largest weight of each word
    kth_V: np.ndarray = field(init=False)  # its k-th largest weight: so much the k-th best score of a query is at least

    def __post_init__(self) -> None:
        self.most_V, self.kth_V = self.postings.most_weights(), self.postings.kth_weights(self.k)

    def all(
        self, query_of: Callable[[int], Query], places: range, go_on: Callable[[int], None] = lambda done: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores float32, documents int64), each (Q, k), of the queries at some places, best first; -inf and -1 fill up.

        go_on: told now and then how many queries are done. Memory: beside the result 4 bytes a document for each of torch's
        threads.
        """
        shape = len(places), self.k
        scores_Qk, docs_Qk = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
        spare: list[np.ndarray] = []  # sums by document, all 0

        def search(start: int) -> None:
            sums_N = spare.pop() if spare else np.zeros(self.postings.num_docs, np.float32)
            for row in range(start, min(start + WORK_QUERIES, len(places))):
                scores, docs = self.one(query_of(places[row]), sums_N)
                scores_Qk[row, : len(docs)], docs_Qk[row, : len(docs)] = scores, docs
            spare.append(sums_N)

        starts = range(0, len(places), WORK_QUERIES)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            try:
                for start, _ in zip(starts, pool.map(search, starts), strict=True):
                    go_on(min(start + WORK_QUERIES, len(places)))
            finally:
                pool.shutdown(cancel_futures=True)
        return scores_Qk, docs_Qk

    def one(self, query: Query, sums_N: np.ndarray) -> Found:
        """Return the best documents of a query. sums_N: float32 zeros, and zeros again afterwards."""
        words, times = query
        docs_n = self._candidates(words, times, sums_N)
        scores_n = self.postings.score(query, docs_n)
        order = np.argsort(-scores_n, kind="stable")[: self.k]  # documents ascend, so equal scores do
        return scores_n[order], docs_n[order]

    def _candidates(self, words: np.ndarray, times: np.ndarray, sums_N: np.ndarray) -> np.ndarray:
        """Return documents among which the k best are, int32, ascending."""
        slack = np.float32(1 + ROUNDING * len(words))
        most_w = times * self.most_V[words]
        order = np.argsort(most_w)
        words, times = words[order], times[order]
        reach_w = np.concatenate([[np.float32(0)], np.cumsum(most_w[order]) * slack])  # of so many of the least words together
        bound = (times * self.kth_V[words]).max(initial=TINY)
        num_rest = int(np.searchsorted(reach_w[1:], bound))  # so many of them do not reach the bound
        docs_n, sums_n = self._sum(words[num_rest:], times[num_rest:], (bound - reach_w[num_rest]) / slack, sums_N)
        for place in range(num_rest, -1, -1):
            if len(docs_n) > self.k:
                bound = max(bound, np.partition(sums_n, -self.k)[-self.k] / slack)
                may_be = sums_n >= (bound - reach_w[place]) / slack
                docs_n, sums_n = docs_n[may_be], sums_n[may_be]
            if place == num_rest:
                order = np.argsort(docs_n)
                docs_n, sums_n = docs_n[order], sums_n[order]
            if place == 0 or len(docs_n) <= FEW * self.k:
                break
            sums_n += times[place - 1] * self.postings.weights_in(words[place - 1], docs_n)
        return docs_n

    def _sum(self, words: np.ndarray, times: np.ndarray, least: float, sums_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents to which some words add `least` or more, in any order, and what they add."""
        lists = [self.postings.of(word) for word in words]
        for at, many in zip(lists, times, strict=True):
            sums_N[self.postings.docs[at]] += many * self.postings.weights[at]
        docs, sums = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        for at in lists:
            here = self.postings.docs[at]
            sums_n = sums_N[here]
            sums_N[here] = 0  # so a document of two words is taken once
            may_be = sums_n >= least
            docs.append(here[may_be])
            sums.append(sums_n[may_be])
        return np.concatenate(docs), np.concatenate(sums)
