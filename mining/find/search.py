"""Search over the shards of all ranks, one tile of queries at a time.

Each rank searches its own shards for all queries of a tile; the best of all shards come together where the queries are
filtered and sampled. The unit is the shard and never the rank, and the order (score descending, id ascending) is total,
so what comes out does not depend on the number of ranks.
"""

import numpy as np

from mining.find.index import ShardIndex
from mining.ranks import Ranks
from trainer.encoder.topk import BestOf, best_of_keys

QUERY_TILE = 4096  # queries searched at once; with k = 200 each rank holds some 20 MB of results
SHARE_ROWS = 32  # queries that never go to different ranks: what is computed of them together does not depend on the ranks


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


def share_of(num_rows: int, rank: int, num_ranks: int) -> slice:
    """Return the rows of a tile that fall to a rank: whole blocks of SHARE_ROWS; shares differ by at most one block."""
    num_blocks = -(-num_rows // SHARE_ROWS)
    return slice(*(min(num_rows, SHARE_ROWS * (num_blocks * r // num_ranks)) for r in (rank, rank + 1)))
