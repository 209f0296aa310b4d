"""What a step's loss is said to hold, against what it holds."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from gradcache import Batch, InfoNCE, LossOptions, NoSync, Temperature, Tower, cached_step
from gradcache.loss_memory import LossSizes, loss_bytes
from gradcache.objectives import AdaptiveMargins
from tests.allocator import Memory
from tests.ranks import run_ranks

QUERIES, PER_QUERY, WIDTH = 256, 3, 192  # a rank; embeddings weigh as much as scores
PLAIN = LossOptions(objective=InfoNCE())
SEVERAL = [
    PLAIN,
    replace(PLAIN, symmetric=True),
    replace(PLAIN, symmetric=True, same_side=True),
    replace(PLAIN, product_dtype=torch.bfloat16),
    replace(PLAIN, widths=(192, 64, 32)),
    replace(PLAIN, tile_rows=64),
    replace(PLAIN, objective=AdaptiveMargins()),
]


def lookup_batch(rank: int = 0) -> Batch:
    """Return rows whose embeddings are there: what a step holds is what the loss holds."""
    rows = QUERIES * (1 + PER_QUERY)
    embedding_nD = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rank))
    keys = torch.arange(rows) + rank * rows
    tower = Tower(encode=lambda chosen: embedding_nD[chosen], lengths=torch.ones(rows, dtype=torch.int64), load=lambda r: r)
    target = torch.arange(QUERIES)
    return Batch(towers=[tower], num_queries=QUERIES, keys=keys, target=target, positive_keys=keys[QUERIES:][target][:, None])


def peak_of(rank: int, options: LossOptions, num_ranks: int) -> int:
    group = dist.group.WORLD if num_ranks > 1 else None
    with Memory() as memory:
        cached_step(
            lookup_batch(rank), loss=options, temperature=Temperature(0.1), sync=NoSync(), group=group, chunk_tokens=64,
            keep_graphs=0, seed=0, step=0,
        )  # fmt: skip
    return memory.peak


def foreseen(options: LossOptions, num_ranks: int) -> int:
    sizes = LossSizes(queries=num_ranks * QUERIES, passages=num_ranks * QUERIES * PER_QUERY, width=WIDTH, num_ranks=num_ranks)
    return loss_bytes(options, sizes, torch.device("cpu"), 10**9).total


def peaks_of(rank: int, options: list[LossOptions]) -> list[int]:
    return [peak_of(rank, each, dist.get_world_size()) for each in options]


def check(peak: int, options: LossOptions, num_ranks: int) -> None:
    said = foreseen(options, num_ranks)
    assert peak <= said <= 1.5 * peak, f"{options}: {said / peak:.2f} of what it holds"


@pytest.mark.parametrize("number", range(len(SEVERAL)))
def test_the_loss_of_one_process_holds_what_is_foreseen(number):
    check(peak_of(0, SEVERAL[number], 1), SEVERAL[number], 1)


def test_the_loss_of_two_ranks_holds_what_is_foreseen_whichever_way_rows_travel():
    every = [replace(options, gather=gather) for gather in ("passages", "queries") for options in SEVERAL]
    for options, peak in zip(every, run_ranks(peaks_of, 2, every)[0], strict=True):
        check(peak, options, 2)


def test_kept_scores_are_what_the_settings_allow_and_no_more_than_there_are():
    sizes = LossSizes(queries=2**14, passages=2**16, width=8, num_ranks=4)
    spread, scores = replace(PLAIN, gather="queries"), 4 * 2**14 * 2**14

    def kept(options: LossOptions, room: float = 2**40, device: str = "meta") -> int:
        return loss_bytes(options, sizes, torch.device(device), room).kept_scores

    assert kept(spread, device="cpu") == min(scores, 2**30) and kept(spread) == scores
    assert kept(spread, room=scores) == scores // 4 and kept(replace(spread, keep_scores_gib=0.25)) == 2**28
    assert kept(replace(PLAIN, gather="passages")) == 0
