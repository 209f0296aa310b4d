"""Queries with something in common stay apart where that is possible, and the work follows how many clash."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from trainer.data import conflicts as conflicts_module
from trainer.data.clusters import Clusters
from trainer.data.conflicts import Conflicts, separate
from trainer.data.sampler import Order, SourceOrder, single_order, step_parts


def of_keys(query_keys, positives):
    """Conflicts of queries by their keys and the lists of their positives' keys."""
    indptr = np.cumsum([0, *map(len, positives)])
    passage_keys = np.unique(np.concatenate([np.asarray(keys, np.int64) for keys in positives]))
    rows = np.searchsorted(passage_keys, np.concatenate([np.asarray(keys, np.int64) for keys in positives]))
    return Conflicts(np.asarray(query_keys, np.int64), indptr, rows, passage_keys)


def keys_of(conflicts, query):
    at = slice(conflicts.positive_indptr[query], conflicts.positive_indptr[query + 1])
    return {int(conflicts.query_keys[query]), *conflicts.passage_keys[conflicts.positive_rows[at]].tolist()}


def num_clashes(found, conflicts):
    """How many queries of each batch share a key with an earlier one, found one by one."""
    num = 0
    for rows in found:
        seen = set()
        for query in rows.tolist():
            num += bool(keys_of(conflicts, query) & seen)
            seen |= keys_of(conflicts, query)
    return num


def batches_of(order, epoch=0):
    n = order.steps_per_epoch
    return [part.rows for step in range(epoch * n, epoch * n + n) for part in step_parts(order, step)]


def duplicated(num_queries, share):
    """Conflicts of queries of which a share is equal to others, and of their positives, too."""
    draw = np.random.default_rng(2)
    keys = np.arange(2 * num_queries).reshape(2, num_queries)
    copies = draw.random((2, num_queries)) < share
    keys[copies] = draw.integers(2 * num_queries, size=copies.sum())
    return of_keys(keys[0], keys[1][:, None])


SIZES = [(60, 10, 0.2), (61, 10, 0.2), (500, 32, 0.3), (5000, 128, 0.5), (5000, 16, 0.5)]


@pytest.mark.parametrize("num_queries, batch, share", SIZES)
def test_clashing_queries_do_not_meet_and_none_is_lost(num_queries, batch, share):
    conflicts = duplicated(num_queries, share)
    plain = single_order(0, num_queries, batch)
    order = dataclasses.replace(plain, conflicts=conflicts)
    num_met_in_plain = 0
    for epoch in range(3):
        found = batches_of(order, epoch)
        assert sorted(np.concatenate(found)) == list(range(num_queries))
        assert num_clashes(found, conflicts) == 0
        num_met_in_plain += num_clashes(batches_of(plain, epoch), conflicts)
    assert num_met_in_plain > 0


@pytest.mark.parametrize("num_batches, copies, allowed", [(20, 10, 0), (64, 40, 2), (20, 20, 105)])
def test_where_every_query_shares_a_key_copies_are_still_kept_apart(num_batches, copies, allowed):
    """A Latin square, where each of 20 copies has one batch to be in, is found by half; 210 clash in it before."""
    keys = np.arange(num_batches * 30) // copies
    conflicts = of_keys(np.arange(10_000, 10_000 + len(keys)), keys[:, None])
    order = dataclasses.replace(single_order(0, len(keys), 30), conflicts=conflicts)
    found = batches_of(order)
    assert sorted(np.concatenate(found)) == list(range(len(keys)))
    assert num_clashes(found, conflicts) <= allowed < num_clashes(batches_of(single_order(0, len(keys), 30)), conflicts)


def test_more_copies_than_batches_meet_after_all():
    conflicts = of_keys(np.zeros(12), [[]] * 12)
    order = dataclasses.replace(single_order(0, 12, 4), conflicts=conflicts)
    found = batches_of(order)
    assert sorted(np.concatenate(found)) == list(range(12)) and num_clashes(found, conflicts) == 9


def test_a_query_clashes_by_its_text_and_by_any_positive_but_not_with_itself():
    # Queries 0 and 1 are equal, 2 has a positive of 0, 3 has one positive twice and nothing in common.
    conflicts = of_keys([7, 7, 8, 9], [[70], [71], [72, 70], [73, 73]])
    place, key = conflicts.shared(np.arange(4))
    assert sorted(Counter(key.tolist()).values()) == [1, 2, 2] and place.tolist() == [0, 0, 1, 2, 3]
    draw = np.random.default_rng(0)
    for rows, batch in (([0, 1, 2, 3], 2), ([0, 3, 1, 2], 2), ([0, 2, 1, 3], 2)):
        found = separate(np.array(rows), batch, conflicts, draw).reshape(2, 2)
        assert sorted(found.ravel()) == [0, 1, 2, 3] and num_clashes(found, conflicts) == 0


def test_a_query_that_comes_twice_in_an_epoch_does_not_meet_itself():
    conflicts = of_keys(np.arange(90), [[]] * 90)
    sources = SourceOrder(0, 60, 9, 1.0), SourceOrder(60, 30, 9, 3.0)
    for mode in ("mixed", "homogeneous"):
        order = Order(0, 9, sources, mode, conflicts=conflicts)
        assert all(len(set(rows.tolist())) == len(rows) for rows in batches_of(order))
        assert any(len(set(rows.tolist())) < len(rows) for rows in batches_of(Order(0, 9, sources, "mixed")))


def test_an_epoch_of_many_windows_is_whole_without_clashes_and_the_same_again():
    """With clusters, too: 40 windows of batches of 8."""
    conflicts = duplicated(20_000, 0.3)
    clusters = Clusters(np.random.default_rng(0).integers(4000, size=20_000), 1)
    for more in ({}, {"clusters": clusters}):
        order, again = (dataclasses.replace(single_order(5, 20_000, 8), conflicts=conflicts, **more) for _ in range(2))
        found = batches_of(order)
        assert sorted(np.concatenate(found)) == list(range(20_000)) and num_clashes(found, conflicts) == 0
        for step in (2499, 7, 1300):
            np.testing.assert_array_equal(step_parts(again, step)[0].rows, found[step])


class Counting:
    """numpy, and how many elements went through the functions that sort."""

    def __init__(self):
        self.num = 0

    def __getattr__(self, name):
        function = getattr(np, name)
        if name not in ("sort", "argsort", "lexsort", "unique", "isin"):
            return function

        def counted(*args, **more):
            self.num += np.asarray(args[0]).shape[-1]
            return function(*args, **more)

        return counted


def test_the_work_follows_the_clashes_after_one_look_at_all(monkeypatch):
    """80,000 queries, 300 for each passage, a fifth of which clash: sorting all in every round, 117 elements a query."""
    num_queries, batch = 80_000, 128
    conflicts = of_keys(np.arange(10**6, 10**6 + num_queries), (np.arange(num_queries) % 266)[:, None])
    plain = single_order(0, num_queries, batch)
    assert num_clashes(batches_of(plain), conflicts) > 0.2 * num_queries
    order = dataclasses.replace(plain, conflicts=conflicts)
    counting = Counting()
    with monkeypatch.context() as patched:
        patched.setattr(conflicts_module, "np", counting)
        found = batches_of(order)
    assert num_clashes(found, conflicts) == 0
    assert counting.num < 30 * num_queries


def test_queries_that_clash_wherever_they_go_cost_no_rounds(monkeypatch):
    """A fifth of all queries have one positive, 25 to a batch."""
    num_queries = 20_000
    keys = np.where(np.arange(num_queries) % 5 == 0, 0, np.arange(num_queries))
    order = single_order(0, num_queries, 128)
    order = dataclasses.replace(order, conflicts=of_keys(np.arange(10**6, 10**6 + num_queries), keys[:, None]))
    counting = Counting()
    with monkeypatch.context() as patched:
        patched.setattr(conflicts_module, "np", counting)
        batches_of(order)
    assert counting.num < 10 * num_queries
