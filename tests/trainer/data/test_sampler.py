"""The order of data is a pure function of an order and a step, whole in every epoch, the same on any number of ranks."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from trainer.data import sampler
from trainer.data.clusters import Clusters
from trainer.data.conflicts import Conflicts
from trainer.data.sampler import (
    Order,
    SourceOrder,
    _turn,
    _window,
    choice,
    global_batch,
    rank_slice,
    single_order,
    sources_begun_anew,
    step_parts,
    steps_per_epoch,
)

SIZES = [(10, 5), (10, 3), (7, 7), (5, 1), (3, 8)]  # of an epoch, of a batch: dividing and not
MODES = ["mixed", "homogeneous", "tasks"]


def make(mode, sizes, batches, weights=None, seed=0, batch=6, **more):
    firsts = np.cumsum([0, *sizes])[:-1].tolist()
    weights = weights or [1.0] * len(sizes)
    sources = tuple(SourceOrder(*values) for values in zip(firsts, sizes, batches, weights, strict=True))
    return Order(seed, batch, sources, mode, **more)


def epoch_rows(order, epoch, source=None):
    """All queries of one epoch, those of one source if one is named."""
    n = order.steps_per_epoch
    parts = [part for step in range(epoch * n, epoch * n + n) for part in step_parts(order, step)]
    return np.concatenate([part.rows for part in parts if source is None or part.source == source])


@pytest.mark.parametrize("num_queries, batch", SIZES)
def test_every_query_comes_once_in_an_epoch(num_queries, batch):
    steps = steps_per_epoch(num_queries, batch)
    for epoch in range(3):
        rows = [global_batch(0, epoch * steps + step, num_queries, batch) for step in range(steps)]
        assert sorted(np.concatenate(rows)) == list(range(num_queries))


@pytest.mark.parametrize("mode", ["mixed", "homogeneous"])
def test_every_query_of_every_source_comes_once_in_an_epoch(mode):
    for sizes in ([5], [12, 7], [1, 20, 6]):
        for batches in ([6, 6, 6], [4, 3, 5], [50, 1, 2]):
            order = make(mode, sizes, batches[: len(sizes)])
            for epoch in range(3):
                assert sorted(epoch_rows(order, epoch)) == list(range(sum(sizes)))


def test_in_tasks_every_source_goes_through_whole_epochs_of_its_own():
    sizes, batches = [20, 7, 3], [6, 2, 5]
    order = make("tasks", sizes, batches)
    assert order.steps_per_epoch == 4
    parts = [step_parts(order, step) for step in range(24)]
    assert all([part.source for part in step] == [0, 1, 2] for step in parts)
    for source, (size, batch) in enumerate(zip(sizes, batches, strict=True)):
        steps = steps_per_epoch(size, batch)
        first = sum(sizes[:source])
        for epoch in range(24 // steps):
            rows = np.concatenate([step[source].rows for step in parts[epoch * steps : (epoch + 1) * steps]])
            assert sorted(rows) == list(range(first, first + size))


def test_a_source_that_ends_early_is_named_once():
    order = make("tasks", [20, 7, 3], [6, 2, 5])
    assert [sources_begun_anew(order, step) for step in range(9)] == [[], [2], [], [], [], [], [], [], []]
    assert sources_begun_anew(make("tasks", [20, 7, 4], [6, 3, 2]), 2) == [2]
    assert not any(sources_begun_anew(make("mixed", [20, 7], [6, 2]), step) for step in range(9))


@pytest.mark.parametrize("mode", MODES)
def test_a_step_depends_on_nothing_that_was_asked_before(mode):
    first, second = (make(mode, [12, 7], [5, 3]) for _ in range(2))
    asked = {step: [part.rows.tolist() for part in step_parts(first, step)] for step in (31, 2, 17, 0)}
    for step in (0, 2, 17, 31):
        assert [part.rows.tolist() for part in step_parts(second, step)] == asked[step]


@pytest.mark.parametrize("mode", MODES)
def test_epochs_and_seeds_have_orders_of_their_own(mode):
    orders = {tuple(epoch_rows(make(mode, [15, 15], [8, 8], seed=seed), epoch)) for seed in range(2) for epoch in range(2)}
    assert len(orders) == 4


def test_homogeneous_steps_have_one_source_and_take_turns_in_another_order_each_epoch():
    order = make("homogeneous", [12, 7], [5, 3])
    turns = []
    for epoch in range(4):
        parts = [step_parts(order, epoch * 6 + step) for step in range(6)]
        for (part,) in parts:
            assert np.all((part.rows >= 12) == (part.source == 1))
        turns.append(tuple(part.source for (part,) in parts))
        assert sorted(turns[-1]) == [0, 0, 0, 1, 1, 1]
    assert len(set(turns)) > 1


@pytest.mark.parametrize("mode", ["mixed", "homogeneous"])
@pytest.mark.parametrize("weight", [0.25, 0.5, 1.5, 3.0])
def test_a_weight_says_how_often_the_queries_of_a_source_come(mode, weight):
    order = make(mode, [12, 20], [5, 5], weights=[1.0, weight])
    num_epochs = 8
    rows = np.concatenate([epoch_rows(order, epoch) for epoch in range(num_epochs)])
    counts = np.bincount(rows, minlength=32)
    assert (counts[:12] == num_epochs).all()
    assert (counts[12:] == num_epochs * weight).all(), "in whole epochs of its own"


def test_the_ranks_share_out_the_same_global_batch():
    for mode in MODES:
        order = make(mode, [60, 41], [23, 11], batch=23)
        for part in step_parts(order, 4):
            for num_ranks in (1, 2, 3, 8, 30):
                shares = [rank_slice(part.rows, rank, num_ranks) for rank in range(num_ranks)]
                np.testing.assert_array_equal(np.concatenate(shares), part.rows)
                assert max(map(len, shares)) - min(map(len, shares)) <= 1


def batches_of(order, epoch=0):
    n = order.steps_per_epoch
    return [part.rows for step in range(epoch * n, epoch * n + n) for part in step_parts(order, step)]


@pytest.mark.parametrize("num_queries, batch", [*SIZES, (240, 24), (250, 24), (1000, 64)])
@pytest.mark.parametrize("num_clusters", [1, 7, 60])
def test_clusters_leave_the_epoch_whole_and_the_sizes_of_its_batches_as_they_are(num_queries, batch, num_clusters):
    of_query = np.random.default_rng(1).integers(num_clusters, size=num_queries)
    plain = single_order(3, num_queries, batch)
    order = dataclasses.replace(plain, clusters=Clusters(of_query, 1))
    for epoch in range(2):
        found = batches_of(order, epoch)
        assert sorted(np.concatenate(found)) == list(range(num_queries))
        assert [len(rows) for rows in found] == [len(rows) for rows in batches_of(plain, epoch)]


def num_cut(found, of_query, batch):
    """How many clusters that a batch could hold are in more than one."""
    in_batches = [np.unique(of_query[rows]) for rows in found]
    spread = np.bincount(np.concatenate(in_batches), minlength=of_query.max() + 1)
    return int(((spread > 1) & (np.bincount(of_query, minlength=len(spread)) <= batch)).sum())


def test_clusters_that_fit_are_not_cut():
    for size, batch in ((4, 24), (24, 24), (1, 24), (12, 24)):
        of_query = np.random.default_rng(0).permutation(np.repeat(np.arange(240 // size), size))
        order = dataclasses.replace(single_order(3, 240, batch), clusters=Clusters(of_query, 1))
        assert num_cut(batches_of(order), of_query, batch) == 0
    uneven = np.random.default_rng(1).integers(200, size=2000)
    order = dataclasses.replace(single_order(3, 2000, 64), clusters=Clusters(uneven, 1))
    assert num_cut(batches_of(order), uneven, 64) <= 5, "of 200, where 31 batches must be full"
    assert num_cut(batches_of(single_order(3, 2000, 64)), uneven, 64) > 190, "without clusters nearly all are spread"


def test_a_cluster_larger_than_a_batch_fills_whole_batches():
    of_query = np.repeat([0, 1, 2], [50, 7, 3])
    order = dataclasses.replace(single_order(0, 60, 20), clusters=Clusters(of_query, 1))
    alone = sum(set(of_query[rows]) == {0} for rows in batches_of(order))
    assert alone == 2


def test_clusters_meet_others_in_each_epoch_and_another_assignment_changes_them():
    of_query = np.repeat(np.arange(60), 4)
    order = dataclasses.replace(single_order(0, 240, 24), clusters=Clusters(of_query, 1))
    meetings = [{tuple(sorted(set(of_query[rows]))) for rows in batches_of(order, epoch)} for epoch in range(2)]
    assert len(meetings[0] & meetings[1]) <= 1
    other = dataclasses.replace(order, clusters=Clusters(of_query[::-1] // 2, 2))
    assert any(a.tolist() != b.tolist() for a, b in zip(batches_of(order), batches_of(other), strict=True))


def test_clusters_hold_within_each_source_of_tasks():
    of_query = np.tile(np.arange(12), 10)
    order = make("tasks", [60, 60], [10, 20], clusters=Clusters(of_query, 1))
    assert all(len(set(of_query[part.rows])) <= 4 for part in step_parts(order, 0))


def test_a_choice_depends_on_its_own_arguments_alone():
    rows = np.arange(1000)
    np.testing.assert_array_equal(choice(3, 5, rows, 1)[500:], choice(3, 5, rows[500:], 1))
    drawn = [choice(3, 5, rows, 1), choice(3, 5, rows, 2), choice(3, 6, rows, 1), choice(4, 5, rows, 1)]
    for i, first in enumerate(drawn):
        assert abs(first.mean() - 0.5) < 0.05 and first.min() >= 0 and first.max() < 1
        for second in drawn[i + 1 :]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def peak_bytes(order, step):
    """What a step's order holds at most while it is made, beside what was there before."""
    step_parts(order, step)  # imports and caches of numpy's own
    fresh = dataclasses.replace(order)
    tracemalloc.start()
    try:
        step_parts(fresh, step + 1)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_a_step_takes_memory_for_its_batch_and_none_for_the_epoch(mode):
    found = [peak_bytes(make(mode, [n, n // 3], [256, 100], [1.0, 1.5], batch=256), n // 500) for n in (500_000, 5_000_000)]
    assert found[1] < 100_000, "two permutations of this epoch are 100 MB"
    assert found[1] < 1.3 * found[0]


def test_conflicts_and_clusters_take_memory_for_a_window_of_batches():
    def order_of(n, **more):
        return dataclasses.replace(single_order(0, n, 64), **more)

    sizes = 20_000, 500_000
    tables = [(np.arange(n) // 2, np.zeros(n + 1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)) for n in sizes]
    found = [peak_bytes(order_of(n, conflicts=Conflicts(*table)), 10) for n, table in zip(sizes, tables, strict=True)]
    assert found[1] < 1.5 * found[0] < 3_000_000

    def bytes_after_first(n):
        order = order_of(n, clusters=Clusters(np.arange(n) // 20, 1))
        step_parts(order, 0)  # makes what is kept of the assignment and of the epoch
        tracemalloc.start()
        step_parts(order, 200)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    small, large = map(bytes_after_first, sizes)
    assert large < 1.5 * small < 3_000_000


@pytest.mark.parametrize("mode", ["mixed", "homogeneous"])
@pytest.mark.parametrize("weight", [0.25, 1.0, 1.5, 3.0])
def test_with_clusters_a_weight_still_says_how_often_queries_come(mode, weight):
    of_query = np.random.default_rng(0).integers(9, size=32)
    order = make(mode, [12, 20], [5, 5], weights=[1.0, weight], clusters=Clusters(of_query, 1))
    plain = dataclasses.replace(order, clusters=None)
    for epoch in range(8):
        np.testing.assert_array_equal(np.sort(epoch_rows(order, epoch)), np.sort(epoch_rows(plain, epoch)))


def test_an_epoch_of_many_windows_is_whole_and_its_clusters_are_cut_at_their_ends_alone():
    """12,000 queries in batches of 16: 750 batches, 11 windows."""
    of_query = np.random.default_rng(0).permutation(np.repeat(np.arange(3000), 4))
    order = dataclasses.replace(single_order(1, 12_000, 16), clusters=Clusters(of_query, 1))
    for epoch in range(2):
        found = batches_of(order, epoch)
        assert sorted(np.concatenate(found)) == list(range(12_000)) and [len(rows) for rows in found] == [16] * 750
        assert num_cut(found, of_query, 16) <= 10, "between eleven windows there are ten ends"
    members = {frozenset(of_query[rows]) for rows in batches_of(order, 0)} & {frozenset(of_query[rows]) for rows in found}
    assert not members, "other clusters meet in the next epoch"


@pytest.mark.parametrize("num_batches", [1, 7, 8, 9, 63, 64, 65, 127, 128, 1000])
@pytest.mark.parametrize("batch", [1, 100, 1 << 15, 1 << 20])
def test_windows_hold_every_batch_once_and_none_is_small(num_batches, batch):
    windows = [_window(place, num_batches, batch) for place in range(num_batches)]
    assert all(first <= place < stop for place, (first, stop) in enumerate(windows))
    ends = sorted(set(windows))
    assert [first for first, _ in ends] == [0, *(stop for _, stop in ends[:-1])] and ends[-1][1] == num_batches
    fewest = min(num_batches, 64 if batch <= 100 else 32 if batch == 1 << 15 else 8)
    assert all(fewest <= stop - first < 2 * fewest or num_batches == fewest for first, stop in ends)


def test_sources_take_turns_evenly_and_each_ones_batches_in_their_order():
    """What a window keeps serves the next batches of its source."""
    order = make("homogeneous", [4000, 1000, 7], [1, 1, 1])
    turns = [_turn(order, 3, step) for step in range(order.steps_per_epoch)]
    for source, size in enumerate([4000, 1000, 7]):
        assert [place for whose, place in turns if whose == source] == list(range(size))
    shares = [np.mean([whose == 1 for whose, _ in turns[start : start + 1024]]) for start in range(0, 4096, 1024)]
    assert np.ptp(shares) < 0.01
    firsts = [whose for whose, _ in turns[:200]]
    assert firsts != [_turn(order, 4, step)[0] for step in range(200)]


def test_a_window_is_made_once_for_all_its_batches_in_every_mode(monkeypatch):
    """The pieces of twenty sources were more than the sixteen that were kept: each step made all of them again."""
    made = []
    monkeypatch.setattr(sampler, "separate", lambda rows, *_: made.append(len(rows)) or rows)
    nothing = np.zeros(0, np.int64)
    conflicts = Conflicts(np.arange(2000), np.zeros(2001, np.int64), nothing, nothing)
    for mode, num_made in (("tasks", 20), ("homogeneous", 20), ("mixed", 1)):
        order = make(mode, [100] * 20, [5] * 20, batch=50, conflicts=conflicts)
        made.clear()
        epoch_rows(order, 0)
        assert len(made) == num_made
