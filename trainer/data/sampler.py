"""Which queries make a step: a pure function of an `Order` and the step, the same on any number of ranks.

Every query comes once in an epoch of its source; the last batch is smaller, never dropped and never filled up. The cursor
is the step, so a run resumes exactly, and on another number of ranks with the same global batches.

mixed        a step is one batch of the queries of all sources; a source of weight 2 comes twice in an epoch
homogeneous  a step is one batch of one source on all ranks; sources take turns by weight x size
tasks        a step has one batch of every source; each goes through its own epochs, the longest makes the run's
             Source of "tasks": Conan-embedding (arXiv 2408.15710), cross-GPU batch balancing.

With clusters, batches are made of whole clusters: NGAME (arXiv 2207.04452), topic clusters (arXiv 2407.18887).
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from trainer.data.clusters import Clusters, pack_clusters
from trainer.data.conflicts import Conflicts, separate

Mode = Literal["mixed", "homogeneous", "tasks"]
STREAM, BATCHES, TURNS = range(3)  # keep the draws of one epoch apart


class SourceOrder(NamedTuple):
    """One source's training queries, which stand together."""

    first: int  # number of its first training query
    size: int
    batch: int  # queries of one global batch, where a batch has one source
    weight: float = 1.0


class Part(NamedTuple):
    """The part of a step that has one loss."""

    source: int | None  # whose queries they are; None: of all sources
    rows: np.ndarray  # numbers of the queries of all ranks, (<= batch,) int64


@dataclass(frozen=True, eq=False)
class Order:
    """All that decides the order of data, beside the step."""

    seed: int
    batch: int  # queries of a step of mixed sources, over all ranks
    sources: tuple[SourceOrder, ...]
    mode: Mode = "mixed"
    # Of all training queries. A new assignment must come into force with an epoch: within one, queries would come twice.
    clusters: Clusters | None = None
    conflicts: Conflicts | None = None  # queries that are kept out of each other's batch as far as it goes

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every query once, those of a source of weight w w times; the longest source in tasks."""
        if self.mode == "mixed":
            return steps_per_epoch(sum(_window(source) for source in self.sources), self.batch)
        if self.mode == "tasks":
            return max(steps_per_epoch(source.size, source.batch) for source in self.sources)
        return sum(steps_per_epoch(_window(source), source.batch) for source in self.sources)


@functools.lru_cache(maxsize=4)
def single_order(seed: int, num_queries: int, batch: int) -> Order:
    """Return the order of one source."""
    return Order(seed, batch, (SourceOrder(0, num_queries, batch),))


def step_parts(order: Order, step: int) -> list[Part]:
    """Return what a step is made of, over all ranks: one part, or one of each source in mode tasks.

    step: counted from 0.
    """
    if order.mode == "tasks":
        return [_task_part(order, source, step) for source in range(len(order.sources))]
    epoch, place = divmod(step, order.steps_per_epoch)
    if order.mode == "mixed":
        return [Part(None, _slice(_mixed_epoch(order, epoch), place, order.batch))]
    source, place = _turns(order, epoch)[place].tolist()
    return [Part(source, _slice(_source_epoch(order, source, epoch), place, order.sources[source].batch))]


def sources_begun_anew(order: Order, step: int) -> list[int]:
    """Return the sources that begin their second epoch at a step while a longer one is still in its first: to be said once."""
    if order.mode != "tasks":
        return []
    lengths = [steps_per_epoch(source.size, source.batch) for source in order.sources]
    return [i for i, length in enumerate(lengths) if length == step < max(lengths)]


def steps_per_epoch(num_queries: int, batch: int) -> int:
    """Return how many batches hold every query of one source once, the last one smaller."""
    return -(-num_queries // batch)


def global_batch(seed: int, step: int, num_queries: int, batch: int) -> np.ndarray:
    """Return the numbers of the queries in the global batch of a step of one source, (<= batch,) int64."""
    return step_parts(single_order(seed, num_queries, batch), step)[0].rows


def rank_slice(rows: np.ndarray, rank: int, num_ranks: int) -> np.ndarray:
    """Return a rank's share of a global batch: contiguous, sizes differing by one at most, zero rows possible."""
    return rows[len(rows) * rank // num_ranks : len(rows) * (rank + 1) // num_ranks]


def _window(source: SourceOrder) -> int:
    """Return how many queries of a source come in an epoch of all."""
    return max(1, round(source.weight * source.size))


def _slice(rows: np.ndarray, place: int, batch: int) -> np.ndarray:
    return rows[place * batch : (place + 1) * batch]


def _task_part(order: Order, source: int, step: int) -> Part:
    own = order.sources[source]
    epoch, place = divmod(step, steps_per_epoch(own.size, own.batch))
    return Part(source, _slice(_task_epoch(order, source, epoch), place, own.batch))


# An epoch's order is made once, and kept until others have been asked for.
@functools.lru_cache(maxsize=4)
def _mixed_epoch(order: Order, epoch: int) -> np.ndarray:
    rows = np.concatenate([_stream(order, source, epoch) for source in range(len(order.sources))])
    return _arranged(order, rows, order.batch, _generator(order.seed, BATCHES, epoch, 0))


@functools.lru_cache(maxsize=16)
def _source_epoch(order: Order, source: int, epoch: int) -> np.ndarray:
    rows = _stream(order, source, epoch)
    return _arranged(order, rows, order.sources[source].batch, _generator(order.seed, BATCHES, epoch, source))


@functools.lru_cache(maxsize=16)
def _task_epoch(order: Order, source: int, epoch: int) -> np.ndarray:
    own = order.sources[source]
    rows = np.arange(own.first, own.first + own.size)
    return _arranged(order, rows, own.batch, _generator(order.seed, BATCHES, epoch, source))


@functools.lru_cache(maxsize=4)
def _turns(order: Order, epoch: int) -> np.ndarray:
    """Return (source, which of its batches) of each step of an epoch, in the order of steps."""
    counts = [steps_per_epoch(_window(source), source.batch) for source in order.sources]
    turns = np.concatenate([np.stack([np.full(n, source), np.arange(n)], axis=1) for source, n in enumerate(counts)])
    return _generator(order.seed, TURNS, epoch, 0).permutation(turns)


def _stream(order: Order, source: int, epoch: int) -> np.ndarray:
    """Return the queries of a source that come in an epoch of all.

    A source is an endless row of its own epochs, each with every query once; an epoch of all takes the next part of it.
    """
    own, window = order.sources[source], _window(order.sources[source])
    start, stop = epoch * window, (epoch + 1) * window
    own_epochs = range(start // own.size, steps_per_epoch(stop, own.size))
    rows = np.concatenate([_generator(order.seed, STREAM, own_epoch, source).permutation(own.size) for own_epoch in own_epochs])
    skipped = start - own_epochs[0] * own.size
    return own.first + rows[skipped : skipped + window]


def _arranged(order: Order, rows: np.ndarray, batch: int, generator: np.random.Generator) -> np.ndarray:
    """Return the rows so that each slice of `batch` of them is a batch."""
    rows = generator.permutation(rows)
    if order.clusters is not None:
        rows = rows[pack_clusters(order.clusters.of_query[rows], batch, generator)]
    return rows if order.conflicts is None else separate(rows, batch, order.conflicts, generator)


def _generator(seed: int, draw: int, epoch: int, source: int) -> np.random.Generator:
    stream = mix(np.uint64(epoch) ^ mix(np.uint64(source) ^ mix(np.uint64(draw))))
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))


def choice(seed: int, step: int, rows: np.ndarray, draw: int) -> np.ndarray:
    """Return one number in [0, 1) for each row, (n,) float64, that depends on (seed, step, row, draw) alone.

    Source: splitmix64 (Steele et al. 2014) as a counter-based generator.
    """
    state = mix(np.uint64(seed) ^ mix(np.uint64(step) ^ mix(np.uint64(draw))))
    return (mix(rows.astype(np.uint64) ^ state) >> np.uint64(11)) / float(1 << 53)


def mix(x):
    """Return a 64-bit mix of each value, uint64. Source: the finaliser of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
