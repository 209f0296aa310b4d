"""Exact search: the k best columns of each row, by (score descending, number ascending).

One tile of scores is held at a time. The order is total, so the result does not depend on how the columns were cut into
parts, but for the last bits of a product.
"""

import numpy as np
import torch

TILE_BYTES = 64 << 20  # memory of one tile of float32 scores


def top_k(
    query_QD: np.ndarray, passage_ND: np.ndarray, k: int, first_id: int = 0, allowed_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores float32, ids int64), each (Q, k), of the best inner products, best first.

    first_id: number of the first passage; ids are first_id + row.
    allowed_N: passages that may be returned; None: all.
    Fewer than k passages: the rest is filled with score -inf and id -1.
    """
    num_queries, num_passages = len(query_QD), len(passage_ND)
    scores_Qk = np.full((num_queries, k), -np.inf, np.float32)
    ids_Qk = np.full((num_queries, k), -1, np.int64)
    passages = _tensor(passage_ND)
    forbidden = None if allowed_N is None else torch.from_numpy(~np.asarray(allowed_N))
    tile = max(1, TILE_BYTES // (4 * max(1, num_passages)))
    num_found = min(k, num_passages)
    for start in range(0, num_queries, tile):
        rows = slice(start, start + tile)
        score_tN = _tensor(query_QD[rows]) @ passages.T
        if forbidden is not None:
            score_tN.masked_fill_(forbidden, -torch.inf)
        scores, ids = _best(score_tN, num_found)
        scores_Qk[rows, :num_found] = scores.numpy()
        ids_Qk[rows, :num_found] = np.where(np.isneginf(scores.numpy()), -1, ids.numpy() + first_id)
    return scores_Qk, ids_Qk


def _best(score_tN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k best of each row, equal scores by number ascending, also where the k-th score is shared."""
    scores, ids = score_tN.topk(k)
    kth = scores[:, -1:]
    # topk picks any of several equal scores: where the k-th is shared, a stable full sort of that row decides.
    shared = ((score_tN == kth).sum(1) > (scores == kth).sum(1)) & ~torch.isneginf(kth[:, 0])
    for row in shared.nonzero()[:, 0].tolist():
        whole = score_tN[row].sort(descending=True, stable=True)
        scores[row], ids[row] = whole.values[:k], whole.indices[:k]
    by_id = ids.argsort(dim=1)
    scores, ids = scores.gather(1, by_id), ids.gather(1, by_id)
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    return scores.gather(1, by_score), ids.gather(1, by_score)


def _tensor(values: np.ndarray) -> torch.Tensor:
    # A copy where the array is a read-only map of a file, which torch does not take.
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))


def merge_top_k(parts: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best k of several (scores, ids) of the same queries, by score descending, then id; -1 ids last."""
    scores = np.concatenate([s for s, _ in parts], axis=1)
    ids = np.concatenate([i for _, i in parts], axis=1)
    scores = np.where(ids < 0, -np.inf, scores)
    order = np.lexsort((np.where(ids < 0, np.iinfo(np.int64).max, ids), -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1).astype(np.float32), np.take_along_axis(ids, order, 1)
