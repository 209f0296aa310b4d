"""A step in as little memory as a test wants: an allocation beyond the limit fails, in a forward, a backward or the loss.

`test_tight.py` says which chunk is refused; here it is whichever comes when memory is full, as on a GPU.
"""

import functools
from dataclasses import replace

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, NoSync, Temperature, cached_step, reference_step
from tests.allocator import Memory
from tests.gradcache.test_backends import LOSS, full_gradients
from tests.gradcache.wide import Wide, wide_batch
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks

HIDDEN, PAIRS = 2048, 128
ROW = 2 * 4 * HIDDEN  # bytes of a row while it is encoded; its graph keeps half of that, its backward takes 1.5 times
# A chunk of 64 rows is encoded in 64 of these, and its backward takes 96, beside up to 25 of gradients, new ones and their sums.
LIMIT = 100 * ROW
STEP = {"loss": replace(LOSS, symmetric=False), "seed": 0, "step": 0}


@functools.cache
def wanted(num_ranks=1):
    encoder, temperature = Wide(HIDDEN), Temperature(0.1, learnable=True)
    reference_step(
        [wide_batch(encoder, PAIRS, seed=1 + r) for r in range(num_ranks)], temperature=temperature, chunk_tokens=10**6, **STEP
    )
    return full_gradients([encoder], temperature)


def take_step(limit, chunk_tokens, keep_graphs, encoder, sync, rank=0, group=None):
    temperature = Temperature(0.1, learnable=True)
    batch = wide_batch(encoder, PAIRS, seed=1 + rank)
    options = {"chunk_tokens": chunk_tokens, "keep_graphs": keep_graphs, "sync": sync, "group": group, **STEP}
    with Memory(limit) as memory:
        result = cached_step(batch, temperature=temperature, **options)
    module = encoder.module if isinstance(encoder, DistributedDataParallel) else encoder
    return result, full_gradients([module], temperature), memory


@pytest.mark.parametrize("chunk_tokens", [256, 70, 30])
@pytest.mark.parametrize("keep_graphs", [0, 2, "all"])
def test_a_memory_that_is_too_small_for_the_chunks_gives_the_same_gradient(chunk_tokens, keep_graphs):
    encoder = Wide(HIDDEN)
    result, found, memory = take_step(LIMIT, chunk_tokens, keep_graphs, encoder, NoSync(encoder))
    assert memory.num_refused or (chunk_tokens, keep_graphs) in ((30, 0), (30, 2)), "these fit"
    assert result.num_halved > 0 or chunk_tokens < 256
    assert_same_gradients(found, wanted())


def test_a_backward_that_fails_has_all_chunks_of_its_size_made_smaller_at_once(caplog):
    encoder = Wide(HIDDEN)
    _, found, memory = take_step(LIMIT, 64, 0, encoder, NoSync(encoder))
    assert memory.num_refused == 1, "four chunks of one size, one of which was tried"
    assert "chunks of 64 padded tokens or more are encoded again in less memory" in caplog.text
    assert_same_gradients(found, wanted())


def test_the_next_step_tells_of_a_backward_that_failed():
    encoder = Wide(HIDDEN)
    sync, told = NoSync(encoder), []
    for limit in (LIMIT, 10**12, 10**12):
        told.append(take_step(limit, 64, 0, encoder, sync)[0].num_halved)
        encoder.zero_grad()
    assert told == [0, 1, 0], "ranks agree before the loss"


def test_what_fails_leaves_nothing_in_memory():
    encoder = Wide(HIDDEN)
    peak = take_step(10**12, 32, 0, encoder, NoSync(encoder))[2].peak
    encoder.zero_grad()
    assert take_step(peak, 256, 0, encoder, NoSync(encoder))[2].num_refused, "a larger chunk, in the memory of a smaller one"


def on_two_ranks(rank, limits, keep_graphs):
    module = DistributedDataParallel(Wide(HIDDEN), broadcast_buffers=False)
    options = {"rank": rank, "group": dist.group.WORLD}
    result, found, memory = take_step(limits[rank], 64, keep_graphs, module, DDPSync(module), **options)
    return result.loss, found, memory.num_refused


@pytest.mark.parametrize("keep_graphs", [0, 2])
def test_a_rank_whose_backward_fails_synchronises_with_the_others_all_the_same(keep_graphs):
    (_, here, unrefused), (_, there, refused) = run_ranks(on_two_ranks, 2, [10**12, LIMIT], keep_graphs)
    assert refused and not unrefused
    assert_same_gradients(here, wanted(2))
    assert_same_gradients(there, wanted(2))
