"""Search over the shards of all ranks: each shard is seen once, by the rank that owns it.

A rank's `Finder` sees its own shards and keeps the best passages of every query of a pass. The best of all ranks come together,
one tile of queries at a time, where the queries are filtered and sampled. The unit is the shard and never the rank, and the
order (score descending, id ascending) is total, so what comes out does not depend on the number of ranks.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mining.ranks import Ranks
from trainer.encoder.topk import BestOf, best_of_keys

SHARE_ROWS = 32  # queries that never go to different ranks: what is computed of them together does not depend on the ranks


class Finder(Protocol):
    """What one rank's shards hold for the queries of a pass. Nothing here speaks to other ranks."""

    is_exact: bool  # whether its scores are those of the embeddings, and its best ones the best that there are

    def see(self, shard: int, vectors: Tensor | np.ndarray) -> None:
        """Take in a shard of this rank, (rows, D) as it is stored: on the device, or mapped from disk."""
        ...

    def keys(self, places: slice) -> np.ndarray:
        """Return the best of the shards seen, (Q, k) int64 in no order, for any slice of the pass' places among all queries."""
        ...


class ExactFinder:
    """The k best passages of each query, by products with all of them. Memory: BestOf's, 8 k bytes a query of the pass."""

    is_exact = True

    def __init__(
        self, places: slice, query_QD: Tensor, k: int, shard_rows: int, allowed_N: np.ndarray, device: torch.device | str
    ):
        """places: of the pass. query_QD: its queries as they are stored, on the device. allowed_N: bool, what may be found."""
        self._first, self._shard_rows, self._allowed_N = places.start, shard_rows, allowed_N
        self._best, self._seen = BestOf(query_QD, k, device), set[int]()

    def see(self, shard: int, vectors: Tensor | np.ndarray) -> None:
        assert shard not in self._seen, f"shard {shard} is searched twice"
        self._seen.add(shard)
        first = shard * self._shard_rows
        allowed_n = np.flatnonzero(self._allowed_N[first : first + len(vectors)])
        self._best.look_at(vectors, allowed_n, first)

    def keys(self, places: slice) -> np.ndarray:
        return self._best.keys(slice(places.start - self._first, places.stop - self._first))


def best_of_ranks(ranks: Ranks, finder: Finder, places: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, ids), each (share, k), of the best passages of all ranks' shards for this rank's share of some queries.

    places: the same on every rank. Collective; a rank sends (share, k) keys, 8 bytes each, to every other.
    """
    return best_of_found(ranks, finder.keys(places))


def best_of_found(ranks: Ranks, keys_Qk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `best_of_ranks` of the keys that this rank has found for some queries. Collective."""
    shares = [share_of(len(keys_Qk), rank, ranks.num_ranks) for rank in range(ranks.num_ranks)]
    scores, ids = best_of_keys(ranks.exchange_arrays([keys_Qk[share] for share in shares]), keys_Qk.shape[1])
    assert not ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).any(), "a passage was found twice"
    return scores, ids


def share_of(num_rows: int, rank: int, num_ranks: int) -> slice:
    """Return the rows of a tile that fall to a rank: whole blocks of SHARE_ROWS; shares differ by at most one block."""
    num_blocks = -(-num_rows // SHARE_ROWS)
    return slice(*(min(num_rows, SHARE_ROWS * (num_blocks * r // num_ranks)) for r in (rank, rank + 1)))
