"""The formula of a step's messages against what real ranks hand over, and against what a step foresees of its way."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from gradcache import DDPSync, InfoNCE, LossOptions, Temperature, cached_step, exchange
from gradcache.loss_memory import LossSizes
from gradcache.objectives import DCLW, AdaptiveMargins, AlignmentUniformity, PairTemperature
from gradcache.traffic import Message, ShardTraffic, parameter_messages, sent_bytes, step_traffic, travelling
from gradcache.way import choose_way
from tests.gradcache.made import made_batch
from tests.ranks import run_ranks

QUERIES, PER_QUERY, WIDTH = 8, 3, 64  # of each rank
# What a rank hands over, by its position, and how often the whole buffer is that.
CALLS = {"_all_gather": ("all_gather", 1), "_reduce_scatter": ("reduce_scatter", 1), "all_reduce": ("all_reduce", 0)}
CALLS |= {"all_to_all_single": ("all_to_all", 1)}
PLAIN = LossOptions(objective=InfoNCE())
CASES = [
    *(replace(PLAIN, gather=way) for way in ("queries", "passages")),
    *(replace(PLAIN, gather=way, symmetric=True) for way in ("queries", "passages")),
    *(replace(PLAIN, gather=way, symmetric=True, same_side=True) for way in ("queries", "passages")),
    *(replace(PLAIN, gather=way, same_side=True, widths=(64, 16)) for way in ("queries", "passages")),
    replace(PLAIN, gather="queries", product_dtype=torch.bfloat16),
    replace(PLAIN, gather="queries", objective=AdaptiveMargins()),
    *(
        replace(PLAIN, gather="queries", symmetric=True, objective=each)
        for each in (DCLW(), AlignmentUniformity(), PairTemperature())
    ),
]


def count(rank: int) -> list[list[tuple[str, int]]]:
    """Return the messages of a step under DDP for each case."""
    messages: list[tuple[str, int]] = []

    def counted(name: str, original: Callable) -> Callable:
        def call(*args, **kwargs):
            kind, position = CALLS[name]
            messages.append((kind, args[position].nbytes * (dist.get_world_size() if kind == "all_gather" else 1)))
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        module = exchange if name.startswith("_") else dist
        setattr(module, name, counted(name, getattr(module, name)))  # in a process of its own
    found = []
    for options in CASES:
        model = torch.nn.Linear(16, WIDTH)
        module = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        sync = DDPSync(module)
        sync.settle_buckets()
        messages.clear()
        cached_step(
            made_batch(rank, module, QUERIES, PER_QUERY), loss=options, temperature=Temperature(0.1), sync=sync,
            group=dist.group.WORLD, chunk_tokens=16, keep_graphs=0, seed=0, step=0,
        )  # fmt: skip
        found.append(list(messages))
    return found


@functools.cache
def counted_on(num_ranks: int) -> list[list[list[tuple[str, int]]]]:
    return run_ranks(count, num_ranks)


def sizes_on(num_ranks: int) -> LossSizes:
    queries = num_ranks * QUERIES
    return LossSizes(queries=queries, passages=queries * PER_QUERY, width=WIDTH, num_ranks=num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_message_of_the_loss_is_foreseen_to_the_byte(number, num_ranks):
    foreseen = step_traffic(CASES[number], sizes_on(num_ranks), 0, in_loop=False)
    for of_rank in counted_on(num_ranks):
        assert [(message.collective, message.num_bytes) for message in foreseen] == of_rank[number]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_step_foresees_the_bytes_of_its_way_by_the_same_formula(number):
    """Further components that carry scores of positives back are too few for the choice of a way."""
    options, sizes = CASES[number], sizes_on(3)
    rows = torch.empty(0, WIDTH, dtype=options.product_dtype or torch.float32)
    here, there = [QUERIES] * 3, [QUERIES * PER_QUERY] * 3
    counts = exchange.Counts(queries=here, passages=there, extra=[0] * 3, positives=here, hidden=[0] * 3)
    from gradcache.widths import plan_views

    way = choose_way(options, counts, plan_views(options.widths, None, {"embedding": WIDTH}, None), rows, 3)
    assert travelling(options, sizes, rows.device) == way.travels
    large = [m for m in step_traffic(options, sizes, 0) if m.phase in ("gather", "statistics", "reduce_scatter")]
    assert sum(sent_bytes(m, 3) for m in large) == pytest.approx(way.foreseen_bytes, rel=0.02)


def test_a_rank_alone_sends_nothing():
    assert step_traffic(PLAIN, replace(sizes_on(2), num_ranks=1), 10**9) == []


def test_a_message_is_sent_but_for_ones_own_part_and_a_sum_goes_twice():
    assert sent_bytes(Message("all_gather", "gather", 1200), 4) == sent_bytes(Message("all_to_all", "statistics", 1200), 4) == 900
    assert sent_bytes(Message("all_reduce", "parameters", 1200), 4) == 1800


def test_gradients_are_reduced_in_ddps_buckets():
    sizes = [m.num_bytes for m in parameter_messages(60 * 2**20, "ddp", ShardTraffic())]
    assert sizes == [2**20, 25 * 2**20, 25 * 2**20, 9 * 2**20]
