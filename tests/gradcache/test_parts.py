"""Several parts in one update: the weighted sum of the parts' references, synchronised once."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, FSDP2Sync, InfoNCE, LossOptions, NoSync, Temperature, cached_step, reference_step
from tests.gradcache.test_backends import build, full_gradients, shard
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.gradcache.test_tight import Limited
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks

LOSS = LossOptions(objective=InfoNCE())
PARTS = [  # weight, the loss, the seed of the batch and of its draws
    (0.7, LossOptions(objective=InfoNCE(positives="mean"), symmetric=True, gather="queries"), 3),
    (2.0, LOSS, 4),
    (0.25, LossOptions(objective=InfoNCE(), same_side=True, gather="passages"), 5),
]
STEP = {"chunk_tokens": 22, "step": 7}
CASES = [(1, 0), (1, "all"), (2, 1)]  # towers, kept graphs
ONE_RANK = ((5,), (3,), (4,))  # rows of each part on each rank
TWO_RANKS = ((3, 2), (0, 4), (2, 0))  # one has none in the middle, the other none at last
THREE_RANKS = ((2, 0, 3), (0, 4, 1), (3, 1, 0))
BACKENDS = [
    ("none", ONE_RANK),
    ("ddp", TWO_RANKS),
    ("ddp", THREE_RANKS),
    ("fsdp2", TWO_RANKS),
    ("fsdp2, every chunk", TWO_RANKS),
]


@functools.cache
def expected(rows, num_towers, equal_chunks):
    """Return the losses of the parts and the weighted sum of their references' gradients."""
    losses, total = [], {}
    for ranks, (weight, loss, seed) in zip(rows, PARTS, strict=True):
        encoders, temperature = build(num_towers)
        batches = [make_batch(rank, n, encoders, seed=seed) for rank, n in enumerate(ranks)]
        options = STEP | {"seed": seed, "equal_chunks": equal_chunks}
        losses.append(reference_step(batches, loss=loss, temperature=temperature, **options))
        for name, gradient in full_gradients(encoders, temperature).items():
            total[name] = total.get(name, 0) + weight * gradient
    return losses, total


def take_parts(rank, rows, called, temperature, sync, group, keep_graphs):
    """Take one step of several parts and return their losses."""
    return [
        cached_step(
            make_batch(rank, ranks[rank], called, seed=seed),
            temperature=temperature,
            sync=sync,
            group=group,
            keep_graphs=keep_graphs,
            weight=weight,
            is_last=i == len(PARTS) - 1,
            loss=loss,
            seed=seed,
            **STEP,
        ).loss
        for i, (ranks, (weight, loss, seed)) in enumerate(zip(rows, PARTS, strict=True))
    ]


def wrapped(encoders, backend):
    if backend == "none":
        return encoders, NoSync(*encoders)
    if backend == "ddp":
        called = [DistributedDataParallel(encoder, broadcast_buffers=False) for encoder in encoders]
        return called, DDPSync(*called)
    called = [shard(encoder) for encoder in encoders]
    return called, FSDP2Sync(*called, reduce_every_chunk=backend == "fsdp2, every chunk")


def steps_of_parts(rank, rows, backend):
    """Return what two steps in a row find, for each case: the second one meets what the first has left behind."""
    group, found = dist.group.WORLD if len(rows[0]) > 1 else None, []
    for num_towers, keep_graphs in CASES:
        encoders, temperature = build(num_towers)
        called, sync = wrapped(encoders, backend)
        for _ in range(2):
            for module in (*encoders, temperature):
                module.zero_grad(set_to_none=True)
            losses = take_parts(rank, rows, called, temperature, sync, group, keep_graphs)
            found.append((losses, full_gradients(encoders, temperature)))
    return found


@pytest.mark.parametrize("backend, rows", BACKENDS)
def test_the_gradient_of_several_parts_is_the_weighted_sum_of_their_references(backend, rows):
    for found in run_ranks(steps_of_parts, len(rows[0]), rows, backend):
        cases = itertools.chain.from_iterable((case, case) for case in CASES)
        for (num_towers, keep_graphs), (losses, gradients) in zip(cases, found, strict=True):
            wanted_losses, wanted = expected(rows, num_towers, backend.startswith("fsdp2"))
            assert losses == pytest.approx(wanted_losses, rel=1e-5), "a weight is not part of the reported loss"
            try:
                assert_same_gradients(gradients, wanted)
            except AssertionError as error:
                raise AssertionError(f"{num_towers} towers, {keep_graphs} graphs kept: {error}") from error


def count_synchronisations(rank, num_parts):
    """Return how often DDP reduced its one bucket in a step of some parts."""
    encoder = DistributedDataParallel(TinyEncoder(0, 0.1).train(), broadcast_buffers=False, bucket_cap_mb=100)
    calls = []

    def hook(_, bucket):
        calls.append(len(bucket.parameters()))
        return dist.group.WORLD.allreduce([bucket.buffer()]).get_future().then(lambda f: f.value()[0] / 2)

    encoder.register_comm_hook(None, hook)
    sync = DDPSync(encoder)
    for part in range(num_parts):
        cached_step(
            make_batch(rank, 4, [encoder], seed=part),
            temperature=Temperature(0.1),
            sync=sync,
            group=dist.group.WORLD,
            keep_graphs=1,
            is_last=part == num_parts - 1,
            loss=LOSS,
            seed=part,
            **STEP,
        )
    return calls


def test_parameters_are_synchronised_once_for_two_parts():
    num_parameters = len(list(TinyEncoder(0, 0.1).parameters()))
    for num_parts in (1, 2):
        for calls in run_ranks(count_synchronisations, 2, num_parts):
            assert calls == [num_parameters]


def test_a_first_part_that_does_not_fit_into_memory_is_made_again_in_halves():
    found = []
    for limits in ({}, {"backward": 40}):
        encoder, temperature = TinyEncoder(0, 0.0).train(), Temperature(0.1, learnable=True)
        called = Limited(encoder, **limits)
        for part in range(2):
            encode = called if part == 0 else encoder
            cached_step(
                make_batch(0, 6, [encode], seed=part),
                loss=LOSS,
                temperature=temperature,
                sync=NoSync(encoder),
                group=None,
                keep_graphs=0,
                seed=part,
                is_last=part == 1,
                **STEP | {"chunk_tokens": 44},
            )
        found.append(full_gradients([encoder], temperature))
        assert bool(called.refused) == bool(limits)
    assert_same_gradients(*found)


def gradient_of_a_first_part(rank):
    encoder = DistributedDataParallel(TinyEncoder(0, 0.0).train(), broadcast_buffers=False)
    options = {"loss": LOSS, "seed": 0, "keep_graphs": 0, **STEP}
    cached_step(
        make_batch(rank, 4, [encoder]),
        temperature=Temperature(0.1),
        sync=DDPSync(encoder),
        group=dist.group.WORLD,
        is_last=False,
        **options,
    )
    return encoder.module.bert.encoder.layer[0].output.dense.weight.grad


def test_a_part_that_is_not_last_leaves_each_rank_its_own_gradients():
    first, second = run_ranks(gradient_of_a_first_part, 2)
    assert float(first.norm()) > 0 and float(second.norm()) > 0 and not torch.allclose(first, second)
