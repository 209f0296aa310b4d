"""Search by words over all ranks: each counts, weighs and searches its own rows of the corpus, for all queries.

Document frequencies and lengths are added over the ranks as whole numbers, and a document's score is summed word by word in the
query's order, so no bit of the result depends on the number of ranks. What a rank sends is of the size of one tile of queries, or
of the queries' words.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from mining.find.bm25 import WordCounts, WordLists, count_words, number_words, read_texts
from mining.find.postings import Search
from mining.find.search import share_of
from mining.ranks import Ranks
from mining.work import Work
from trainer.encoder.topk import merge_top_k


@dataclass
class BM25Retriever:
    """Finds and scores candidates by their words. All methods but `score_positives` are collective."""

    ranks: Ranks
    queries: WordLists  # all training queries
    search: Search  # in this rank's rows of the corpus
    num_passages: int
    go_on: Callable[[int], None]  # told how many queries are searched; may raise Stopped or Superseded

    def find(self, tile: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores float32, ids int64), each (n, k), best first, of this rank's share of a tile of queries."""

        def find_here() -> tuple[np.ndarray, np.ndarray]:
            return self.search.all(self.queries.of, range(tile.start, tile.stop), lambda done: self.go_on(tile.start + done))

        scores_Qk, ids_Qk = self.ranks.together(find_here)
        ids_Qk[ids_Qk >= 0] += self._own.start
        shares = [share_of(len(ids_Qk), rank, self.ranks.num_ranks) for rank in range(self.ranks.num_ranks)]
        found = (self.ranks.exchange_arrays([table[share] for share in shares]) for table in (scores_Qk, ids_Qk))
        return merge_top_k(list(zip(*found, strict=True)), self.search.k)

    def score(self, places: slice, ids_nR: np.ndarray) -> np.ndarray:
        """Return the scores of any passages for the queries of this rank's share, (n, R) float32; -inf where the id is -1.

        0: no common word, or a passage that may not be found.
        """
        scores_nR = np.full(ids_nR.shape, -np.inf, np.float32)
        rows, at = np.nonzero(ids_nR >= 0)
        ids_n = ids_nR[rows, at]
        order = np.argsort(ids_n, kind="stable")
        pairs_n2 = np.stack([rows + places.start, ids_n], 1)[order].astype(np.int64)
        starts = [part_of(self.num_passages, rank, self.ranks.num_ranks).start for rank in range(1, self.ranks.num_ranks)]
        asked = self.ranks.exchange_arrays(np.split(pairs_n2, np.searchsorted(pairs_n2[:, 1], starts)))
        answers = self.ranks.together(lambda: [self._score_pairs(part) for part in asked])
        scores_nR[rows[order], at[order]] = np.concatenate(self.ranks.exchange_arrays(answers))
        return scores_nR

    def score_positives(self, places: slice) -> None:
        return None

    @property
    def _own(self) -> range:
        return part_of(self.num_passages, self.ranks.rank, self.ranks.num_ranks)

    def _score_pairs(self, pairs_n2: np.ndarray) -> np.ndarray:
        """Return the scores of pairs of query and own passage, (n,) float32."""
        scores_n = np.empty(len(pairs_n2), np.float32)
        order = np.argsort(pairs_n2[:, 0], kind="stable")
        queries, starts = np.unique(pairs_n2[order, 0], return_index=True)
        for query, at in zip(queries, np.split(order, starts[1:]), strict=bool(len(queries))):
            docs_n = (pairs_n2[at, 1] - self._own.start).astype(np.int32)
            scores_n[at] = self.search.postings.score(self.queries.of(query), docs_n)
        return scores_n


def index_words(work: Work, top_k: int) -> BM25Retriever:
    """Return what finds the top_k best passages of each query by their words. Collective; raises Stopped on all.

    A phase of its own. Memory: what `words_plan.py` foresees.
    """
    ranks, data, judgements = work.ranks, work.data, work.judgements
    own = part_of(len(data.corpus), ranks.rank, ranks.num_ranks)

    def go_on(done: int, total: int) -> None:
        work.progress(done, total)
        ranks.check_stop()

    def count_own() -> tuple[WordLists, WordCounts]:
        queries = number_words(_heeding(read_texts(data.queries, judgements.query_rows), lambda: go_on(0, len(own))))
        return queries, count_words(data.corpus, own, queries.number_of, judgements.allowed_N, lambda done: go_on(done, len(own)))

    with work.phase("indexing words", passages=len(data.corpus)):
        queries, counts = ranks.together(count_own)
        statistics = sum_over_ranks(ranks, counts.statistics)
        search = ranks.together(lambda: Search(counts.weigh(statistics), top_k))
    queries = replace(queries, number_of={})  # which is large, and done with
    return BM25Retriever(ranks, queries, search, len(data.corpus), lambda done: go_on(done, judgements.num_queries))


def part_of(num_passages: int, rank: int, num_ranks: int) -> range:
    """Return the rows of the corpus whose words a rank has."""
    return range(num_passages * rank // num_ranks, num_passages * (rank + 1) // num_ranks)


def sum_over_ranks(ranks: Ranks, numbers_V: np.ndarray) -> np.ndarray:
    """Return the sum of every rank's whole numbers, on every rank; each adds up a part of them. Collective."""
    of_part = ranks.exchange_arrays(np.array_split(numbers_V, ranks.num_ranks))
    return np.concatenate(ranks.exchange_arrays([np.sum(of_part, axis=0)] * ranks.num_ranks))


def _heeding(batches: Iterable[list[str]], heed: Callable[[], None]) -> Iterator[list[str]]:
    for batch in batches:
        heed()
        yield batch
