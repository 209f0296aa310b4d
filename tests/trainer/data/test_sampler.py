"""The order of data is a pure function of an order and a step, whole in every epoch, the same on any number of ranks."""

import dataclasses

import numpy as np
import pytest

from trainer.data.clusters import Clusters
from trainer.data.conflicts import clashing, find_conflicts
from trainer.data.sampler import (
    Order,
    SourceOrder,
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


def duplicated(num_queries, share):
    """Conflicts of queries of which a share is equal to others, and of their positives, too."""
    draw = np.random.default_rng(2)
    keys = np.arange(2 * num_queries).reshape(2, num_queries)
    copies = draw.random((2, num_queries)) < share
    keys[copies] = draw.integers(2 * num_queries, size=copies.sum())
    return find_conflicts(keys[0], np.arange(num_queries + 1), keys[1])


@pytest.mark.parametrize("num_queries, batch, share", [(60, 10, 0.2), (61, 10, 0.2), (500, 32, 0.3), (5000, 128, 0.5)])
def test_clashing_queries_do_not_meet_and_none_is_lost(num_queries, batch, share):
    conflicts = duplicated(num_queries, share)
    plain = single_order(0, num_queries, batch)
    order = dataclasses.replace(plain, conflicts=conflicts)
    num_met_in_plain = 0
    for epoch in range(3):
        rows = np.concatenate(batches_of(order, epoch))
        assert sorted(rows) == list(range(num_queries))
        assert not clashing(rows, batch, conflicts).any()
        num_met_in_plain += clashing(np.concatenate(batches_of(plain, epoch)), batch, conflicts).sum()
    assert num_met_in_plain > 0


def test_more_copies_than_batches_meet_after_all():
    conflicts = find_conflicts(np.zeros(12, np.int64), np.zeros(13, np.int64), np.zeros(0, np.int64))
    order = dataclasses.replace(single_order(0, 12, 4), conflicts=conflicts)
    assert sorted(np.concatenate(batches_of(order))) == list(range(12))


def test_a_query_clashes_by_its_text_and_by_any_positive_but_not_with_itself():
    # Queries 0 and 1 are equal, 2 has a positive of 0, 3 has one positive twice and nothing in common.
    conflicts = find_conflicts(np.array([7, 7, 8, 9]), np.array([0, 1, 2, 4, 6]), np.array([70, 71, 72, 70, 73, 73]))
    assert clashing(np.array([0, 1, 2, 3]), 4, conflicts).tolist() == [False, True, True, False]
    assert clashing(np.array([0, 1, 2, 3]), 1, conflicts).tolist() == [False] * 4
    assert clashing(np.array([1, 2, 0, 3]), 2, conflicts).tolist() == [False] * 4


def test_a_choice_depends_on_its_own_arguments_alone():
    rows = np.arange(1000)
    np.testing.assert_array_equal(choice(3, 5, rows, 1)[500:], choice(3, 5, rows[500:], 1))
    drawn = [choice(3, 5, rows, 1), choice(3, 5, rows, 2), choice(3, 6, rows, 1), choice(4, 5, rows, 1)]
    for i, first in enumerate(drawn):
        assert abs(first.mean() - 0.5) < 0.05 and first.min() >= 0 and first.max() < 1
        for second in drawn[i + 1 :]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
