"""The queries of an epoch by their places in it, computed for the places that are asked for.

A source repeats its own epochs without end; each has every query once, in a new order. An epoch over all sources takes the
next part of each source's sequence.
"""

from dataclasses import dataclass

import numpy as np

from trainer.data.shuffle import key_of, shuffle, unshuffle

STREAM, MIXED = 0, 1  # keep the draws of one epoch apart; sampler.py has further ones


@dataclass(frozen=True, eq=False)
class Stream:
    """Sources that are gone through together; arrays have an element a source, int64."""

    seed: int
    firsts: np.ndarray  # number of its first query
    sizes: np.ndarray  # its queries
    counts: np.ndarray  # how many of them an epoch takes

    def rows(self, source: int | None, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the queries at the places from start to stop of an epoch, int64: of a source, or of all mixed (None)."""
        place_n = np.arange(start, stop)
        if source is not None or len(self.sizes) == 1:
            return self._rows(np.array([source or 0]), epoch, place_n)
        stops = np.cumsum(self.counts)
        place_n = shuffle(place_n, int(stops[-1]), key_of(self.seed, MIXED, epoch))
        source_n = np.searchsorted(stops, place_n, side="right")
        return self._rows(source_n, epoch, place_n - (stops - self.counts)[source_n])

    def _rows(self, source_n: np.ndarray, epoch: int, place_n: np.ndarray) -> np.ndarray:
        own_epoch_n, at_n = np.divmod(epoch * self.counts[source_n] + place_n, self.sizes[source_n])
        if (own_epoch_n == own_epoch_n[:1]).all():
            own_epoch_n = own_epoch_n[:1]  # one key for all is quicker
        return self.firsts[source_n] + shuffle(at_n, self.sizes[source_n], self._key(own_epoch_n, source_n))

    def times(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Return how often each query comes in an epoch, int64: `rows` backwards."""
        source_n = np.searchsorted(self.firsts, rows, side="right") - 1
        size_n, start_n = self.sizes[source_n], epoch * self.counts[source_n]
        stop_n = start_n + self.counts[source_n]
        lowest_n, highest_n = start_n // size_n, (stop_n - 1) // size_n  # own epochs; those between come whole
        times = np.maximum(highest_n - lowest_n - 1, 0)
        for own_epoch_n, is_another in ((lowest_n, True), (highest_n, highest_n > lowest_n)):
            at_n = unshuffle(rows - self.firsts[source_n], size_n, self._key(own_epoch_n, source_n))
            place_n = own_epoch_n * size_n + at_n
            times += (place_n >= start_n) & (place_n < stop_n) & is_another
        return times

    def _key(self, own_epoch_n: np.ndarray, source_n: np.ndarray) -> np.ndarray:
        return key_of(self.seed, STREAM, own_epoch_n, source_n)
