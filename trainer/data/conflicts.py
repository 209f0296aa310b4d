"""Queries that should not meet in one batch: equal ones, and those that share a positive.

The loss masks their columns anyway; apart, each has a whole batch of negatives. Those that clash change places with
others, at random, until none clash or nothing improves any more: more copies than batches cannot be kept apart.
"""

from dataclasses import dataclass

import numpy as np

PATIENCE = 10  # rounds of swapping without improvement


@dataclass(frozen=True, eq=False)
class Conflicts:
    """Keys that a query has in common with others: two that share one clash; of query q keys[indptr[q]:indptr[q + 1]]."""

    indptr: np.ndarray  # (num_queries + 1,) int64
    keys: np.ndarray  # int64, each once for a query


def find_conflicts(query_keys: np.ndarray, positive_indptr: np.ndarray, positive_keys: np.ndarray) -> Conflicts:
    """Return the conflicts of queries by their own content keys and those of all their positives."""
    num_queries = len(query_keys)
    owners = np.concatenate([np.arange(num_queries), np.repeat(np.arange(num_queries), np.diff(positive_indptr))])
    keys = np.concatenate([query_keys, positive_keys])
    # Most keys belong to one query alone, and keep it from no batch.
    order = np.lexsort((owners, keys))
    owners, keys = owners[order], keys[order]
    is_new = np.r_[True, (np.diff(keys) != 0) | (np.diff(owners) != 0)]
    owners, keys = owners[is_new], keys[is_new]
    is_shared = np.zeros(len(keys) + 1, bool)
    is_shared[1:-1] = np.diff(keys) == 0
    is_shared = is_shared[1:] | is_shared[:-1]
    order = np.argsort(owners[is_shared], kind="stable")
    indptr = np.searchsorted(owners[is_shared][order], np.arange(num_queries + 1))
    return Conflicts(indptr, keys[is_shared][order])


def separate(rows: np.ndarray, batch: int, conflicts: Conflicts, generator: np.random.Generator) -> np.ndarray:
    """Return the rows in an order whose slices of `batch` hold as few clashing queries as swapping reaches."""
    is_clashing, rounds_left = clashing(rows, batch, conflicts), PATIENCE
    while rounds_left and is_clashing.any():
        places = np.flatnonzero(is_clashing)
        others = generator.choice(np.flatnonzero(~is_clashing), min(len(places), len(rows) - len(places)), replace=False)
        places = places[: len(others)]
        swapped = rows.copy()
        swapped[places], swapped[others] = rows[others], rows[places]
        after = clashing(swapped, batch, conflicts)
        is_better = after.sum() < is_clashing.sum()
        rows, is_clashing = (swapped, after) if is_better else (rows, is_clashing)
        rounds_left = PATIENCE if is_better else rounds_left - 1
    return rows


def clashing(rows: np.ndarray, batch: int, conflicts: Conflicts) -> np.ndarray:
    """Return which places hold a query that clashes with an earlier one of its batch, (n,) bool."""
    start, count = conflicts.indptr[rows], np.diff(conflicts.indptr)[rows]
    place = np.repeat(np.arange(len(rows)), count)
    within = np.arange(len(place)) - np.repeat(np.cumsum(count) - count, count)
    keys = conflicts.keys[start[place] + within]
    order = np.lexsort((keys, place // batch))
    same = (np.diff(keys[order]) == 0) & (np.diff(place[order] // batch) == 0)
    found = np.zeros(len(rows), bool)
    found[place[order[1:][same]]] = True
    return found
