"""Which queries make the global batch of a step: a pure function of (seed, step).

Every query comes once in an epoch; the last batch of an epoch is smaller, never dropped and never filled up. The cursor
is the step, so a run resumes exactly, and on another number of ranks with the same global batches.
"""

import functools

import numpy as np


def steps_per_epoch(num_queries: int, batch: int) -> int:
    """Return how many steps see every query once."""
    return -(-num_queries // batch)


def global_batch(seed: int, step: int, num_queries: int, batch: int) -> np.ndarray:
    """Return the numbers of the queries in the global batch of a step, (<= batch,) int64.

    step: counted from 0.
    """
    epoch, position = divmod(step, steps_per_epoch(num_queries, batch))
    return _permutation(seed, epoch, num_queries)[position * batch : (position + 1) * batch]


def rank_slice(rows: np.ndarray, rank: int, num_ranks: int) -> np.ndarray:
    """Return a rank's share of a global batch: contiguous, sizes differing by one at most, zero rows possible."""
    return rows[len(rows) * rank // num_ranks : len(rows) * (rank + 1) // num_ranks]


def choice(seed: int, step: int, rows: np.ndarray, draw: int) -> np.ndarray:
    """Return one number in [0, 1) for each row, (n,) float64, that depends on (seed, step, row, draw) alone.

    Source: splitmix64 (Steele et al. 2014) as a counter-based generator.
    """
    state = mix(np.uint64(seed) ^ mix(np.uint64(step) ^ mix(np.uint64(draw))))
    return (mix(rows.astype(np.uint64) ^ state) >> np.uint64(11)) / float(1 << 53)


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_queries: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_queries)


def mix(x):
    """Return a 64-bit mix of each value, uint64. Source: the finaliser of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
