"""The order of data is a pure function of seed and step, whole in every epoch, the same on any number of ranks."""

import numpy as np
import pytest

from trainer.data.sampler import choice, global_batch, rank_slice, steps_per_epoch


@pytest.mark.parametrize("num_queries, batch", [(10, 5), (10, 3), (7, 7), (5, 1)])
def test_every_query_comes_once_in_an_epoch(num_queries, batch):
    steps = steps_per_epoch(num_queries, batch)
    for epoch in range(3):
        rows = [global_batch(0, epoch * steps + step, num_queries, batch) for step in range(steps)]
        assert sorted(np.concatenate(rows)) == list(range(num_queries))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(global_batch(seed, step, 20, 20)) for seed in range(2) for step in range(2)}
    assert len(orders) == 4


def test_the_ranks_share_out_the_same_global_batch():
    rows = global_batch(1, 4, 100, 23)
    for num_ranks in (1, 2, 3, 8, 30):
        shares = [rank_slice(rows, rank, num_ranks) for rank in range(num_ranks)]
        np.testing.assert_array_equal(np.concatenate(shares), rows)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_choice_depends_on_its_own_arguments_alone():
    rows = np.arange(1000)
    np.testing.assert_array_equal(choice(3, 5, rows, 1)[500:], choice(3, 5, rows[500:], 1))
    drawn = [choice(3, 5, rows, 1), choice(3, 5, rows, 2), choice(3, 6, rows, 1), choice(4, 5, rows, 1)]
    for i, first in enumerate(drawn):
        assert abs(first.mean() - 0.5) < 0.05 and first.min() >= 0 and first.max() < 1
        for second in drawn[i + 1 :]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
