"""Search over the shards of all ranks, one tile of queries at a time.

Each rank searches its own shards for all queries of a tile; the best of all shards come together where the queries are
filtered and sampled. The unit is the shard and never the rank, and the order (score descending, id ascending) is total,
so what comes out does not depend on the number of ranks.
"""

from dataclasses import dataclass

import numpy as np

from mining.encode import Embeddings
from mining.index import ShardIndex
from mining.ranks import Ranks
from trainer.encoder.topk import BestOf, best_of_keys
from trainer.errors import InputError

QUERY_TILE = 4096  # queries searched at once; with k = 200 each rank holds some 20 MB of results


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Section `search`."""

    top_k: int = 200  # candidates of each query (ANCE: 200)

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"search.top_k={self.top_k} must be at least 1")


def search_shards(ranks: Ranks, indexes: list[ShardIndex], query_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, ids), each (share, k), of the best passages of all shards for this rank's share of the queries.

    indexes: of this rank's shards; may be empty.
    query_QD: the same on every rank; rank r gets the rows `share_of(len(query_QD), ranks)`.
    Collective: one exchange; every rank sends (share, k) keys, 8 bytes each, to every other.
    """
    best = BestOf(query_QD, k, indexes[0].device if indexes else "cpu")
    for index in indexes:
        index.search_into(best)
    keys_Qk = best.keys()
    shares = [share_of(len(query_QD), rank, ranks.num_ranks) for rank in range(ranks.num_ranks)]
    return best_of_keys(ranks.exchange([keys_Qk[rows] for rows in shares]), k)


def best_positive_scores(query_QD: np.ndarray, passages: Embeddings, indptr: np.ndarray, positive_rows: np.ndarray) -> np.ndarray:
    """Return the score of each query's best positive, (Q,) float32; every query has one, in CSR form."""
    if len(query_QD) == 0:
        return np.zeros(0, np.float32)
    query_PD = np.repeat(query_QD, np.diff(indptr), axis=0)
    score_P = (query_PD * passages.read(positive_rows)).sum(1)
    return np.maximum.reduceat(score_P, indptr[:-1])


def share_of(num_rows: int, rank: int, num_ranks: int) -> slice:
    """Return the rows that fall to a rank; shares differ by at most one row."""
    return slice(num_rows * rank // num_ranks, num_rows * (rank + 1) // num_ranks)
