"""From candidates to a table of negatives, one tile of queries at a time: retrieve, filter, sample.

Memory holds one tile of candidates and the negatives drawn so far. Each rank works on its share of every tile; rank 0
puts the rows together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mining.filters import FilterSettings, filter_candidates
from mining.judgements import Judgements, own_texts
from mining.ranks import Ranks
from mining.sampling import SampleSettings, sample_negatives
from mining.search import QUERY_TILE, share_of

# (places of a tile) -> scores (n, K), ids (n, K) of this rank's share of it, and the score of each query's best positive
Retrieve = Callable[[slice], tuple[np.ndarray, np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class Drawn:
    """The negatives of all queries, in CSR form, and what was counted on the way."""

    indptr: np.ndarray
    ids: np.ndarray
    scores: np.ndarray
    num_candidates: int
    dropped: dict[str, int]  # by filter


def draw_negatives(
    filters: FilterSettings,
    sample: SampleSettings,
    seed: int,
    version: int,
    ranks: Ranks,
    judgements: Judgements,
    keys: tuple[np.ndarray, np.ndarray],
    retrieve: Retrieve,
    on_progress: Callable[[int, int], None],
    query_tile: int = QUERY_TILE,
) -> Drawn | None:
    """Return the negatives on rank 0, None elsewhere.

    keys: content keys of all passages and of all training queries.
    on_progress: called with queries done and to do.
    query_tile: queries retrieved at once; changes nothing but the memory.
    Raises Stopped on every rank if one is asked to stop. Collective.
    """
    parts = []
    for start in range(0, judgements.num_queries, query_tile):
        tile = slice(start, min(start + query_tile, judgements.num_queries))
        on_progress(start, judgements.num_queries)
        ranks.together(ranks.check_stop)
        scores_QK, ids_QK, positive_score_Q = retrieve(tile)
        share = share_of(tile.stop - tile.start, ranks.rank, ranks.num_ranks)
        places = slice(tile.start + share.start, tile.start + share.stop)
        own = own_texts(judgements, places, *keys)
        keep, dropped = filter_candidates(filters, ids_QK, scores_QK, keys[0][ids_QK], own, positive_score_Q)
        rows = judgements.query_rows[places]
        counts, ids, scores = sample_negatives(sample, seed, version, rows, ids_QK, scores_QK, keep, positive_score_Q)
        parts.append((places.start, counts, ids, scores, int((ids_QK >= 0).sum()), dropped))
    gathered = ranks.gather(parts)
    return _join([part for parts in gathered for part in parts]) if ranks.speaks else None


def _join(parts: list[tuple]) -> Drawn:
    parts.sort(key=lambda part: part[0])
    # Shares of no query have the place of the next one; they add nothing, in any order.
    _, counts, ids, scores, num_candidates, dropped = zip(*parts, strict=True)
    totals: dict[str, int] = {}
    for counters in dropped:
        for name, count in counters.items():
            totals[name] = totals.get(name, 0) + count
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return Drawn(indptr, np.concatenate(ids), np.concatenate(scores), sum(num_candidates), totals)
