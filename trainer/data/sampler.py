"""Which queries make a step: a pure function of an `Order` and the step, the same on any number of ranks.

Every query comes once in an epoch of its source; the last batch is smaller, never dropped and never filled up. The cursor
is the step, so a run resumes exactly, and on another number of ranks with the same global batches.

mixed        a step is one batch of the queries of all sources; a source of weight 2 comes twice in an epoch
homogeneous  a step is one batch of one source on all ranks; sources take turns by weight x size
tasks        a step has one batch of every source; each goes through its own epochs, the longest makes the run's
             Source of "tasks": Conan-embedding (arXiv 2408.15710), cross-GPU batch balancing.

With clusters, batches are made of whole clusters: NGAME (arXiv 2207.04452), topic clusters (arXiv 2407.18887).

An epoch's order is computed for the places that are asked for (shuffle.py), so a step takes memory for its batch and none
for the epoch. Clusters and conflicts look at a window of some batches at once, which is kept until the next one.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from trainer.data.clusters import ClusteredEpoch, Clusters, members_of, pack_clusters
from trainer.data.conflicts import Conflicts, separate
from trainer.data.shuffle import key_of, mix
from trainer.data.stream import Stream
from trainer.handoff.settings import Mode

TURNS, WINDOWS, CLUSTERS = 2, 3, 4  # keep the draws of one epoch apart; stream.py has the first ones
FEWEST_BATCHES, MOST_BATCHES = 8, 64  # of a window: few queries to hold, many batches among which to keep copies apart
WINDOW_ROWS = 1 << 20  # of a window, where the two above leave a choice
BLOCK_TURNS = 1024  # turns of sources that are shuffled among themselves


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
    # Results that the next step needs again, one of each kind and source; all of them could be computed anew.
    kept: dict[tuple[str, int | None], tuple[Any, Any]] = field(default_factory=dict, init=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every query once, those of a source of weight w w times; the longest source in tasks."""
        if self.mode == "mixed":
            return _num_batches(self, None)
        lengths = [_num_batches(self, source) for source in range(len(self.sources))]
        return max(lengths) if self.mode == "tasks" else sum(lengths)


@functools.lru_cache(maxsize=4)
def single_order(seed: int, num_queries: int, batch: int) -> Order:
    """Return the order of one source."""
    return Order(seed, batch, (SourceOrder(0, num_queries, batch),))


def step_parts(order: Order, step: int) -> list[Part]:
    """Return what a step is made of, over all ranks: one part, or one of each source in mode tasks.

    step: counted from 0.
    """
    if order.mode == "tasks":
        own = [divmod(step, _num_batches(order, source)) for source in range(len(order.sources))]
        return [Part(source, _batch_rows(order, source, *at)) for source, at in enumerate(own)]
    epoch, place = divmod(step, order.steps_per_epoch)
    if order.mode == "mixed":
        return [Part(None, _batch_rows(order, None, epoch, place))]
    source, place = _turn(order, epoch, place)
    return [Part(source, _batch_rows(order, source, epoch, place))]


def sources_begun_anew(order: Order, step: int) -> list[int]:
    """Return the sources that begin their second epoch at a step while a longer one is still in its first: to be said once."""
    if order.mode != "tasks":
        return []
    lengths = [_num_batches(order, source) for source in range(len(order.sources))]
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


def _stream(order: Order) -> Stream:
    """Return what epochs are taken from: of all sources by weight, in tasks each source's own."""
    firsts, sizes = (np.array([source[i] for source in order.sources]) for i in (0, 1))
    weights = [1.0 if order.mode == "tasks" else source.weight for source in order.sources]
    counts = [max(1, round(weight * source.size)) for weight, source in zip(weights, order.sources, strict=True)]
    return Stream(order.seed, firsts, sizes, np.array(counts))


def _extent(order: Order, source: int | None) -> tuple[int, int]:
    """Return how many queries an epoch has, and how many a batch: of a source, or of all mixed."""
    counts = _stream(order).counts
    return (int(counts.sum()), order.batch) if source is None else (int(counts[source]), order.sources[source].batch)


def _num_batches(order: Order, source: int | None) -> int:
    return steps_per_epoch(*_extent(order, source))


def _turn(order: Order, epoch: int, step: int) -> tuple[int, int]:
    """Return which source a step of an epoch takes, and which batch of that source; batches of one source come in order."""
    lengths = [_num_batches(order, source) for source in range(len(order.sources))]
    block, at = divmod(step, BLOCK_TURNS)
    before, after = (_even_counts(lengths, min((block + i) * BLOCK_TURNS, sum(lengths))) for i in (0, 1))
    turns = np.repeat(np.arange(len(lengths)), np.subtract(after, before))
    turns = _generator(order.seed, TURNS, epoch, block).permutation(turns)
    source = int(turns[at])
    return source, before[source] + int((turns[:at] == source).sum())


def _even_counts(lengths: list[int], num_turns: int) -> list[int]:
    """Return how many of the first turns are each source's, as evenly as whole numbers go."""
    counts, left, total = [], num_turns, sum(lengths)
    for length in lengths:
        counts.append(left * length // total if total else 0)
        left, total = left - counts[-1], total - length
    return counts


def _batch_rows(order: Order, source: int | None, epoch: int, place: int) -> np.ndarray:
    """Return the queries of a batch: the one at a place among the batches of an epoch."""
    num, batch = _extent(order, source)
    if order.clusters is None and order.conflicts is None:
        return _stream(order).rows(source, epoch, place * batch, min((place + 1) * batch, num))
    first, stop = _window(place, steps_per_epoch(num, batch), batch)
    rows = _kept(order, "window", source, (epoch, first), lambda: _arranged(order, source, epoch, first, stop))
    return rows[(place - first) * batch : (place + 1 - first) * batch]


def _window(place: int, num_batches: int, batch: int) -> tuple[int, int]:
    """Return the first batch of the window that a batch belongs to, and the first one after it."""
    num_windows = max(1, num_batches // max(FEWEST_BATCHES, min(MOST_BATCHES, WINDOW_ROWS // batch)))
    number = ((place + 1) * num_windows - 1) // num_batches
    return number * num_batches // num_windows, (number + 1) * num_batches // num_windows


def _arranged(order: Order, source: int | None, epoch: int, first: int, stop: int) -> np.ndarray:
    """Return the queries of a window of batches, so that each slice of a batch's size is a batch."""
    num, batch = _extent(order, source)
    generator = _generator(order.seed, WINDOWS, epoch, len(order.sources) if source is None else source, first)
    first, stop = first * batch, min(stop * batch, num)
    if order.clusters is None:
        rows = _stream(order).rows(source, epoch, first, stop)
    else:
        clustered = _kept(order, "clusters", source, epoch, lambda: _clustered(order, source, epoch))
        rows, cluster = clustered.between(first, stop)
        rows = rows[pack_clusters(cluster, batch, generator)]
    return rows if order.conflicts is None else separate(rows, batch, order.conflicts, generator)


def _clustered(order: Order, source: int | None, epoch: int) -> ClusteredEpoch:
    assert order.clusters is not None
    own = SourceOrder(0, len(order.clusters.of_query), 0) if source is None else order.sources[source]
    of_query = order.clusters.of_query[own.first : own.first + own.size]
    members = _kept(order, "members", source, None, lambda: members_of(of_query, own.first))
    stream = _stream(order)
    key = key_of(order.seed, CLUSTERS, epoch, len(order.sources) if source is None else source)
    return ClusteredEpoch(members, lambda rows: stream.times(epoch, rows), key)


def _kept(order: Order, kind: str, source: int | None, which: Any, make: Callable[[], Any]) -> Any:
    """Return the result of make(), and keep it until another one of the same kind and source is asked for."""
    slot = kind, source
    if slot not in order.kept or order.kept[slot][0] != which:
        order.kept[slot] = which, make()
    return order.kept[slot][1]


def _generator(seed: int, *words: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, key_of(0, *words)], np.uint64)))


def choice(seed: int, step: int, rows: np.ndarray, draw: int) -> np.ndarray:
    """Return one number in [0, 1) for each row, (n,) float64, that depends on (seed, step, row, draw) alone.

    Source: splitmix64 (Steele et al. 2014) as a counter-based generator.
    """
    state = mix(np.uint64(seed) ^ mix(np.uint64(step) ^ mix(np.uint64(draw))))
    return (mix(rows.astype(np.uint64) ^ state) >> np.uint64(11)) / float(1 << 53)
