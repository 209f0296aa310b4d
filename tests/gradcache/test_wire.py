"""What travels: bytes and memory of a loss by the number of hard negatives of a query, for both ways of gathering."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from gradcache import Batch, InfoNCE, LossOptions, NoSync, Temperature, Tower, cached_step, exchange
from tests.ranks import run_ranks
from tests.sizes import Sizes

NUM_RANKS, NUM_QUERIES, WIDTH = 3, 8, 256  # of each rank; so wide that a row is larger than its keys and statistics
HARD = [0, 1, 7]
SENT = {"_all_gather": 1, "_reduce_scatter": 1, "all_reduce": 0, "all_to_all_single": 1}  # position of what a rank sends
TOTALS = 3  # numbers of the last reduction: loss, masked cells, temperature


def count(rank: int, gather: str, symmetric: bool, same_side: bool):
    """Return of each number of hard negatives the messages of a step, with their bytes, and the largest tensor's bytes."""
    found = {}
    messages: list[tuple[str, int]] = []

    def counted(name: str, original: Callable) -> Callable:
        def call(*args, **kwargs):
            messages.append((name, args[SENT[name]].nbytes))
            return original(*args, **kwargs)

        return call

    for name in SENT:
        module = exchange if name.startswith("_") else dist
        setattr(module, name, counted(name, getattr(module, name)))  # in a process of its own
    for num_hard in HARD:
        messages.clear()
        with Sizes() as sizes:
            _step(rank, num_hard, gather, symmetric, same_side)
        found[num_hard] = list(messages), sizes.largest_bytes
    return found


def _step(rank: int, num_hard: int, gather: str, symmetric: bool, same_side: bool) -> None:
    num_passages = (1 + num_hard) * NUM_QUERIES
    generator = torch.Generator().manual_seed(rank)
    rows = torch.nn.functional.normalize(torch.randn(NUM_QUERIES + num_passages, WIDTH, generator=generator), dim=1)
    rows.requires_grad_()
    keys = 10_000 * rank + torch.arange(len(rows))
    tower = Tower(encode=lambda x: x, lengths=torch.ones(len(rows), dtype=torch.int64), load=lambda chosen: rows[chosen])
    cached_step(
        Batch(
            towers=[tower],
            num_queries=NUM_QUERIES,
            keys=keys,
            target=torch.arange(NUM_QUERIES),
            positive_keys=keys[NUM_QUERIES : 2 * NUM_QUERIES, None],
        ),
        loss=LossOptions(objective=InfoNCE(), gather=gather, symmetric=symmetric, same_side=same_side),
        temperature=Temperature(0.1, learnable=True),
        sync=NoSync(),
        group=dist.group.WORLD,
        chunk_tokens=16,
        keep_graphs=0,
        seed=0,
        step=0,
    )


@functools.cache
def found_by_ranks(gather: str, symmetric: bool, same_side: bool):
    return run_ranks(count, NUM_RANKS, gather, symmetric, same_side)


SIDES = [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize("symmetric, same_side", SIDES)
def test_hard_negatives_cost_no_traffic_but_their_keys_where_queries_travel(symmetric, same_side):
    for found in found_by_ranks("queries", symmetric, same_side):
        first, _ = found[0]
        for num_hard in HARD[1:]:
            messages, _ = found[num_hard]
            more = [(a, b - c) for (a, b), (_, c) in zip(messages, first, strict=True) if b != c]
            assert more == [("_all_gather", 8 * num_hard * NUM_QUERIES)], "the keys, 64 bits each"


def test_what_travels_is_the_queries_and_a_few_numbers_of_each():
    """No message is larger than the queries that it carries, and there are as many as there are kinds of content."""
    for found in found_by_ranks("queries", False, False):
        rows = 4 * NUM_QUERIES * WIDTH
        of_all = NUM_RANKS * NUM_QUERIES
        (counts, keys, queries, there, again, gradient, totals), _ = found[7]
        assert [name for name, _ in (counts, keys, queries)] == ["_all_gather"] * 3
        assert keys[1] == 8 * NUM_QUERIES * (
            8 + 1 + 1 + 1 + 1 + 1
        )  # passages, query, target, number of positives, one, its score
        assert queries[1] == rows
        assert there == again == ("all_to_all_single", 4 * of_all)  # one statistic of each query, and its derivative
        assert gradient == ("_reduce_scatter", NUM_RANKS * rows)
        assert totals == ("all_reduce", 8 * TOTALS)


def test_passages_travel_with_their_gradients_where_that_is_asked_for():
    for found in found_by_ranks("passages", False, False):
        for num_hard in HARD:
            rows = 4 * (1 + num_hard) * NUM_QUERIES * WIDTH
            messages, _ = found[num_hard]
            assert ("_all_gather", rows) in messages and ("_reduce_scatter", NUM_RANKS * rows) in messages


@pytest.mark.parametrize("symmetric, same_side", SIDES)
def test_nothing_of_the_size_of_all_passages_exists_on_a_rank(symmetric, same_side):
    row_bytes = 4 * WIDTH
    # All queries, and their targets where these travel too; of passages this rank's own.
    travelled = NUM_RANKS * NUM_QUERIES * (2 if symmetric and same_side else 1)
    for found in found_by_ranks("queries", symmetric, same_side):
        for num_hard, (_, largest_bytes) in found.items():
            own = (2 + num_hard) * NUM_QUERIES
            assert largest_bytes <= max(travelled, own) * row_bytes, num_hard
    for found in found_by_ranks("passages", symmetric, same_side):
        assert found[7][1] >= NUM_RANKS * 8 * NUM_QUERIES * row_bytes, "the proof sees them where they do exist"
