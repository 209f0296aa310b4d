"""Every backend, towers, uneven rows, kept graphs: the reference's gradients on real ranks, one reduction a step."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gradcache import FSDP2Sync, InfoNCE, LossOptions, Temperature, cached_step, reference_step
from gradcache import exchange as exchange_module
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks

LOSS = LossOptions(objective=InfoNCE(positives="mean"))
SETTINGS = {"chunk_tokens": 22, "seed": 3, "step": 7}
CASES = [(1, 2, False, False), (2, 1, True, True)]  # towers, kept graphs, symmetric, reduce every chunk


def build(num_towers):
    return [TinyEncoder(seed, 0.2).train() for seed in range(num_towers)], Temperature(0.1, learnable=True)


def shard(encoder):
    for layer in encoder.bert.encoder.layer:
        fully_shard(layer)
    return fully_shard(encoder)


def full_gradients(encoders, temperature):
    """Return the whole gradients. Collective."""
    found = {"temperature.log_scale": temperature.log_scale.grad.clone()}
    for i, encoder in enumerate(encoders):
        for name, parameter in encoder.named_parameters():
            grad = parameter.grad
            found[f"tower{i}.{name}"] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def sharded_steps(rank, rows):
    """Return the gradients of all cases, two steps each, and the reductions of parameters of each case's last step."""
    found = []
    for num_towers, keep_graphs, symmetric, every_chunk in CASES:
        encoders, temperature = build(num_towers)
        called = [shard(encoder) for encoder in encoders]
        sync = FSDP2Sync(*called, reduce_every_chunk=every_chunk)
        for seed in range(2):
            for module in (*encoders, temperature):
                module.zero_grad(set_to_none=True)
            result = cached_step(
                make_batch(rank, rows[rank], called, seed=seed),
                temperature=temperature,
                sync=sync,
                group=dist.group.WORLD,
                keep_graphs=keep_graphs,
                loss=replace(LOSS, symmetric=symmetric),
                **SETTINGS,
            )
            found.append((result.loss, full_gradients(encoders, temperature)))
    return found


@functools.cache
def expected(rows, num_towers, symmetric, seed):
    encoders, temperature = build(num_towers)
    batches = [make_batch(rank, n, encoders, seed=seed) for rank, n in enumerate(rows)]
    options = replace(LOSS, symmetric=symmetric)
    loss = reference_step(batches, loss=options, temperature=temperature, equal_chunks=len(rows) > 1, **SETTINGS)
    return loss, full_gradients(encoders, temperature)


@pytest.mark.parametrize("rows", [(5, 3), (3, 0, 1)])
def test_gradients_of_two_steps_under_fsdp2_are_the_references(rows):
    for found in run_ranks(sharded_steps, len(rows), rows):
        for number, (loss, gradients) in enumerate(found):
            num_towers, _, symmetric, _ = CASES[number // 2]
            wanted_loss, wanted = expected(rows, num_towers, symmetric, number % 2)
            assert loss == pytest.approx(wanted_loss, rel=1e-5), CASES[number // 2]
            assert_same_gradients(gradients, wanted)


def count_reductions(rank, chunk_tokens, every_chunk):
    """Return the number of chunks and how often a step reduced each of the encoder's three groups of parameters."""
    (encoder,), temperature = build(1)
    called = shard(encoder)
    calls = []
    original = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
        if hasattr(dist, name):
            setattr(dist, name, counted)
    exchange_module._reduce_scatter = original
    result = cached_step(
        make_batch(rank, 6, [called]),
        temperature=temperature,
        sync=FSDP2Sync(called, reduce_every_chunk=every_chunk),
        group=dist.group.WORLD,
        keep_graphs=1,
        loss=LOSS,
        **SETTINGS | {"chunk_tokens": chunk_tokens},
    )
    return result.num_chunks, len(calls)


def test_fsdp2_reduces_once_a_step_or_once_a_chunk():
    for chunk_tokens in (10_000, 22):
        for _, reductions in run_ranks(count_reductions, 2, chunk_tokens, False):
            assert reductions == 3, "two layers and the rest"
        for num_chunks, reductions in run_ranks(count_reductions, 2, chunk_tokens, True):
            assert reductions == 3 * num_chunks


def test_the_whole_step_may_run_under_autocast():
    """Weights that autocast has cast without grad mode would otherwise be reused, and get no gradient."""
    from gradcache import NoSync

    found = []
    for whole in (True, False):
        (encoder,), temperature = build(1)
        narrow = torch.autocast("cpu", torch.bfloat16)
        encode = encoder if whole else narrow(encoder)
        with torch.autocast("cpu", torch.bfloat16, enabled=whole):
            batch = make_batch(0, 5, [encode])
            cached_step(batch, loss=LOSS, temperature=temperature, sync=NoSync(), group=None, keep_graphs=1, **SETTINGS)
        found.append(full_gradients([encoder], temperature))
    largest = max(float(gradient.norm()) for gradient in found[1].values())
    trained = [name for name, gradient in found[1].items() if float(gradient.norm()) > 1e-3 * largest]  # keys' biases have none
    assert len(trained) > 20
    for name in trained:
        gradient = found[0][name]
        # Backward runs under autocast in one of them, which rounds other products to bfloat16's 8 bits.
        assert gradient is not None and torch.cosine_similarity(gradient.flatten(), found[1][name].flatten(), 0) > 0.999, name
