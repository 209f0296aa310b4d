"""One passage of each text stands in an index for all that have its text, and what it finds is spread over them again.

An index that held a text a hundred times would spend a hundred places of every answer on it, and which of equal scores it
leaves out would depend on the order in which they were added, and so on the ranks.
"""

import numpy as np
import torch

from trainer.encoder.score_keys import pack_keys


class Entries:
    """Which passages are in an index, and which others each of them stands for. Memory: a byte a passage, and the repeats."""

    def __init__(self, allowed_N: np.ndarray, key_N: np.ndarray | None = None):
        """allowed_N: bool, passages that may be found. key_N: of their texts; None: every passage is an entry of its own."""
        self.is_entry_N = allowed_N.copy()
        self._ids = np.zeros(0, np.int64)  # entries that stand for several, ascending
        self._starts, self._counts, self._copies = (np.zeros(0, np.int64) for _ in range(3))
        if key_N is None:
            return
        rows = np.flatnonzero(allowed_N)
        rows = rows[np.argsort(key_N[rows], kind="stable")]  # by text, and then by row
        is_first = np.ones(len(rows), bool)
        is_first[1:] = key_N[rows[1:]] != key_N[rows[:-1]]
        self.is_entry_N[rows[~is_first]] = False
        starts = np.flatnonzero(is_first)
        counts = np.diff([*starts, len(rows)]) if len(starts) else starts
        repeated = counts > 1
        by_id = np.argsort(rows[starts[repeated]])
        self._ids, self._counts = rows[starts[repeated]][by_id], counts[repeated][by_id]
        spread = np.repeat(starts[repeated][by_id], self._counts)
        self._starts = np.cumsum(self._counts) - self._counts
        self._copies = rows[spread + np.arange(len(spread)) - np.repeat(self._starts, self._counts)]

    @property
    def num_entries(self) -> int:
        return int(self.is_entry_N.sum())

    def are_settled(self, scores_Qm: np.ndarray, ids_Qm: np.ndarray, depth: int) -> np.ndarray:
        """Tell for which queries the best `depth` passages are among some best entries and all that these stand for, (Q,) bool.

        scores_Qm: descending. An entry that was not found scores as the last one at most: passages of equal scores are cut by
        their ids, so those of the last score count only if there is nothing else.
        """
        num_Qm = np.where(scores_Qm > scores_Qm[:, -1:], self._num(ids_Qm), 0)
        return (ids_Qm[:, -1] < 0) | (num_Qm.sum(1) >= depth)

    def spread(self, scores_Qm: np.ndarray, ids_Qm: np.ndarray, depth: int) -> np.ndarray:
        """Return the keys of the best `depth` passages that some entries stand for, (Q, depth) int64 in no order."""
        num_Qm = np.where(ids_Qm < 0, 0, np.minimum(self._num(ids_Qm), depth))
        # What stands behind `depth` passages of better scores is cut anyway; of equal scores all are needed.
        is_new_Qm = np.ones(scores_Qm.shape, bool)
        is_new_Qm[:, 1:] = scores_Qm[:, 1:] < scores_Qm[:, :-1]
        before_Qm = num_Qm.cumsum(1) - num_Qm
        better_Qm = np.maximum.accumulate(np.where(is_new_Qm, before_Qm, 0), axis=1)
        num_Qm[better_Qm >= depth] = 0
        longest = max(depth, int(num_Qm.sum(1).max(initial=0)))
        row_n, entry_n = (np.repeat(each, num_Qm.ravel()) for each in np.indices(ids_Qm.shape).reshape(2, -1))
        copy_n = np.arange(len(row_n)) - np.repeat(num_Qm.cumsum() - num_Qm.ravel(), num_Qm.ravel())
        place_n = np.arange(len(row_n)) - np.searchsorted(row_n, row_n)
        scores_QK = np.full((len(ids_Qm), longest), -np.inf, np.float32)
        ids_QK = np.full((len(ids_Qm), longest), -1, np.int64)
        scores_QK[row_n, place_n] = scores_Qm[row_n, entry_n]
        ids_QK[row_n, place_n] = self._copy(ids_Qm[row_n, entry_n], copy_n)
        return keys_of(scores_QK, ids_QK, depth)

    def _find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where entries stand among those that stand for several, and whether they do."""
        if not len(self._ids):
            return np.zeros(ids.shape, np.int64), np.zeros(ids.shape, bool)
        at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return at, self._ids[at] == ids

    def _num(self, ids: np.ndarray) -> np.ndarray:
        at, is_repeated = self._find(ids)
        return np.where(is_repeated, self._counts[at], 1) if len(self._ids) else np.ones(ids.shape, np.int64)

    def _copy(self, ids_n: np.ndarray, copy_n: np.ndarray) -> np.ndarray:
        """Return the copy_n-th passage that each entry stands for."""
        if not len(self._ids):
            return ids_n
        at, is_repeated = self._find(ids_n)
        return np.where(is_repeated, self._copies[np.where(is_repeated, self._starts[at] + copy_n, 0)], ids_n)


def keys_of(scores_QK: np.ndarray, ids_QK: np.ndarray, depth: int) -> np.ndarray:
    """Return the `depth` best of what a search has found, (Q, depth) int64 as `BestOf` keeps them; K >= depth."""
    keys_QK = pack_keys(torch.from_numpy(scores_QK), torch.from_numpy(ids_QK))
    return keys_QK.topk(depth, sorted=False).values.numpy()
