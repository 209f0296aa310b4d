"""Keeps queries out of each other's batch that are equal, or share a positive.

In one batch the loss would mask their columns; in different batches each has a whole batch of negatives. Queries that clash
swap places with random others, until none clash or the rounds are over. If a text has more copies than there are batches, some
copies must meet. The first round looks at all queries, later ones only at those that still clash and at those with which they
might swap.
"""

from dataclasses import dataclass

import numpy as np

ROUNDS = 30  # of swapping; each settles most of what is left
FEW = 1000  # pairs of a query and a batch that may be looked at however few clash


@dataclass(frozen=True, eq=False)
class Conflicts:
    """The content keys by which queries clash: two queries clash if they share one. Refers to tables that exist already,
    without a copy.
    """

    query_keys: np.ndarray  # (num_queries,) int64, of each query's own text
    positive_indptr: np.ndarray  # (num_queries + 1,) int64
    positive_rows: np.ndarray  # rows of passage_keys, int64
    passage_keys: np.ndarray  # (num_passages,) int64

    def shared(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys that some queries have in common, as (place in `rows`, number of the key), by place, int64.

        A query that comes twice clashes with itself.
        """
        start, count = self.positive_indptr[rows], self.positive_indptr[rows + 1] - self.positive_indptr[rows]
        owner, at = _ragged(start, count)
        place = np.concatenate([np.arange(len(rows)), owner])
        keys = np.concatenate([self.query_keys[rows], self.passage_keys[self.positive_rows[at]]])
        _, number, times = np.unique(keys, return_inverse=True, return_counts=True)
        is_shared = times[number] > 1  # most keys belong to one query alone, and keep it from no batch
        code = np.unique(place[is_shared] * len(times) + number[is_shared])  # each once for a query
        return np.divmod(code, max(1, len(times)))


def separate(rows: np.ndarray, batch: int, conflicts: Conflicts, generator: np.random.Generator) -> np.ndarray:
    """Return the rows in an order whose slices of `batch` hold as few clashing queries as swapping reaches."""
    seats = _Seats(len(rows), batch, *conflicts.shared(rows))
    clashing = seats.later_of_a_clash()
    for _ in range(ROUNDS):
        clashing = clashing[seats.may_part(clashing)]
        if not len(clashing):
            break
        seats.swap(clashing, seats.query_at[seats.targets(clashing, generator)])
    return rows[seats.query_at]


class _Seats:
    """Which query is at which place, and which keys each batch holds. A query is known by the place that it had at the start."""

    def __init__(self, num_queries: int, batch: int, owner: np.ndarray, key: np.ndarray):
        self.query_at = np.arange(num_queries)
        self._place_of = np.arange(num_queries)
        self._batch, self._num_batches = batch, -(-num_queries // batch)
        self._owner, self._key, self._num_keys = owner, key, int(key.max(initial=0)) + 1
        self._indptr = np.searchsorted(owner, np.arange(num_queries + 1))
        # A batch and a key are one number. What came and what left since the beginning is kept apart, and stays short.
        self._held = np.sort(owner // batch * self._num_keys + key)
        self._came = self._left = np.zeros(0, np.int64)
        # (keys,) in how many batches each one is: with a key that all have, a query clashes wherever it goes
        self._spread = np.bincount(np.unique(self._held) % self._num_keys, minlength=self._num_keys)

    def later_of_a_clash(self) -> np.ndarray:
        """Return the queries that clash with an earlier one of their batch, before any swap."""
        code = self._owner // self._batch * self._num_keys + self._key
        order = np.argsort(code, kind="stable")
        found = np.unique(self._owner[order[1:]][np.diff(code[order]) == 0])
        self._num_first = len(found)
        return found

    def may_part(self, query_m: np.ndarray) -> np.ndarray:
        """Return which queries clash within their batch and can be helped: they have no key that every batch has, (m,) bool."""
        who, codes = self._codes(query_m, self._place_of[query_m] // self._batch)
        is_everywhere = self._spread[codes % self._num_keys] == self._num_batches
        return _any(who, self._count(codes) > 1, len(query_m)) & ~_any(who, is_everywhere, len(query_m))

    def targets(self, query_m: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return a place for each query to move to: a random one while many clash, later one in a batch without its keys."""
        num_places = len(self.query_at)
        if len(query_m) * self._num_batches > max(self._num_first, FEW):
            return generator.integers(num_places, size=len(query_m))
        pair_query, pair_batch = (grid.ravel() for grid in np.meshgrid(query_m, np.arange(self._num_batches), indexing="ij"))
        who, codes = self._codes(pair_query, pair_batch)
        # (m, batches): a random number, -1 where the batch has one of the query's keys
        draw = generator.random(len(pair_query))
        draw[_any(who, self._count(codes) > 0, len(pair_query))] = -1
        first = draw.reshape(len(query_m), -1).argmax(axis=1) * self._batch
        return first + (generator.random(len(query_m)) * np.minimum(self._batch, num_places - first)).astype(np.int64)

    def swap(self, query_m: np.ndarray, other_m: np.ndarray) -> None:
        """Swap pairs of queries, where neither of a pair clashes with anything in its new batch."""
        _, first = np.unique(other_m, return_index=True)  # each other one once, and none that has to go itself
        first = first[~np.isin(other_m[first], query_m)]
        query_m, other_m = query_m[first], other_m[first]
        movers = np.concatenate([query_m, other_m])
        to = np.concatenate([self._place_of[other_m], self._place_of[query_m]])
        who, codes = self._codes(movers, to // self._batch)
        # A query that leaves in this round still counts in its batch, because which ones leave is known only when all have been
        # checked.
        is_bad = _any(who, (self._count(codes) > 0) | (_times(codes) > 1), len(movers))
        is_good = ~(is_bad[: len(query_m)] | is_bad[len(query_m) :])
        moved = np.concatenate([is_good, is_good])
        _, left = self._codes(movers[moved], self._place_of[movers[moved]] // self._batch)
        self._left, self._came = np.sort(np.append(self._left, left)), np.sort(np.append(self._came, codes[moved[who]]))
        gone = np.unique(left[self._count(left) == 0])
        np.add.at(self._spread, codes[moved[who]] % self._num_keys, 1)
        np.subtract.at(self._spread, gone % self._num_keys, 1)
        self._place_of[movers[moved]], self.query_at[to[moved]] = to[moved], movers[moved]

    def _codes(self, query_m: np.ndarray, batch_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys that queries have in batches, as (which of the m, code)."""
        who, at = _ragged(self._indptr[query_m], self._indptr[query_m + 1] - self._indptr[query_m])
        return who, batch_m[who] * self._num_keys + self._key[at]

    def _count(self, codes: np.ndarray) -> np.ndarray:
        """Return how many queries of its batch have each key now."""
        return _found(self._held, codes) + _found(self._came, codes) - _found(self._left, codes)


def _found(sorted_codes: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.searchsorted(sorted_codes, codes, side="right") - np.searchsorted(sorted_codes, codes)


def _times(codes: np.ndarray) -> np.ndarray:
    """Return how often each code is among them."""
    return _found(np.sort(codes), codes)


def _any(which: np.ndarray, is_true: np.ndarray, num: int) -> np.ndarray:
    """Return for each of `num` things whether one of its entries is true, (num,) bool."""
    found = np.zeros(num, bool)
    found[which[is_true]] = True
    return found


def _ragged(start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places start … start + count of each slice one after the other, as (which slice, place)."""
    which = np.repeat(np.arange(len(start)), count)
    return which, np.arange(len(which)) + np.repeat(start - (np.cumsum(count) - count), count)
