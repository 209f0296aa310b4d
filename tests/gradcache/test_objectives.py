"""Objectives in closed form; two steps in a row with a rank that has no rows; mutations that the proof must notice."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, InfoNCE, LossOptions, Temperature, cached_step, reference_step
from tests.gradcache.named import NAMED
from tests.gradcache.test_step import build, make_batch, named
from tests.gradcache.vectors import step_of_vectors, vectors
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks

LOSS = LossOptions(objective=InfoNCE(positives="mean"), symmetric=True)
OPTIONS = {"chunk_tokens": 22, "seed": 3, "loss": LOSS}


@pytest.mark.parametrize("name", ["info_nce", "info_nce_multi"])
def test_info_nce_is_cross_entropy_whatever_the_tile(name):
    torch.manual_seed(0)
    q, p = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(3.0, dtype=torch.float64).log().requires_grad_()
    loss = torch.nn.functional.cross_entropy(q @ p.T * log_scale.exp(), torch.arange(5))
    wanted = torch.autograd.grad(loss, [q, p, log_scale])
    for tile_rows in (1, 2, 5, None):
        q.grad = p.grad = None
        result, temperature = step_of_vectors(vectors(q, p), LossOptions(objective=NAMED[name], tile_rows=tile_rows), 3.0)
        assert result.loss == pytest.approx(loss.item(), rel=1e-6)
        for found, gradient in zip([q.grad, p.grad, temperature.log_scale.grad], wanted, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)  # a temperature starts as a float32


@pytest.mark.parametrize("name", ["info_nce", "info_nce_multi"])
def test_a_row_without_negatives_has_no_loss_and_a_finite_gradient(name):
    q, p = torch.randn(1, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    result, _ = step_of_vectors(vectors(q, p, torch.tensor([[1, 2]])), LossOptions(objective=NAMED[name]), 2.0)
    assert result.loss == pytest.approx(0, abs=1e-6)
    assert q.grad.abs().max() < 1e-6 and p.grad.abs().max() < 1e-6  # NaN fails too


def test_same_side_info_nce_is_cross_entropy_over_both_sides():
    torch.manual_seed(0)
    q, p = torch.nn.functional.normalize(torch.randn(8, 6), dim=1).split(4)
    options = LossOptions(objective=InfoNCE(), symmetric=True, same_side=True)
    found, _ = step_of_vectors(vectors(q, p), options, 2.0)
    own = torch.full((4, 4), 0.0).fill_diagonal_(-torch.inf)
    forth = torch.cat([q @ p.T, q @ q.T + own], 1) / 0.5
    back = torch.cat([p @ q.T, p @ p.T + own], 1) / 0.5
    wanted = sum(torch.nn.functional.cross_entropy(scores, torch.arange(4)) for scores in (forth, back)) / 2
    assert found.loss == pytest.approx(float(wanted), rel=1e-6)


def two_steps(rank, rows, mutation):
    encoders, temperature = build(2, 0.2), Temperature(0.1, learnable=True)
    called = [DistributedDataParallel(e, broadcast_buffers=False) for e in encoders]
    sync = DDPSync(*called)
    if mutation == "forgets W":
        sync.gradient_scale = lambda: 1.0
    found = []
    for step in range(2):
        for module in (*encoders, temperature):
            module.zero_grad(set_to_none=True)
        cached_step(
            make_batch(rank, rows[rank], called, seed=step),
            temperature=temperature,
            sync=sync,
            group=dist.group.WORLD,
            keep_graphs=2,
            step=step,
            **OPTIONS,
        )
        found.append(named(encoders, temperature))
    return found


def wanted(rows, step):
    encoders, temperature = build(2, 0.2), Temperature(0.1, learnable=True)
    batches = [make_batch(rank, n, encoders, seed=step) for rank, n in enumerate(rows)]
    reference_step(batches, temperature=temperature, step=step, **OPTIONS)
    return named(encoders, temperature)


@pytest.mark.parametrize("rows", [(5, 3), (0, 4), (3, 0, 2)])
def test_two_steps_in_a_row_of_two_modules(rows):
    by_rank = run_ranks(two_steps, len(rows), rows, None)
    for step in range(2):
        for found in by_rank:
            assert_same_gradients(found[step], wanted(rows, step))


def test_the_proof_notices_a_forgotten_factor():
    found = run_ranks(two_steps, 2, (5, 3), "forgets W")[0][0]
    with pytest.raises(AssertionError, match=r"ratio 0\.5"):
        assert_same_gradients(found, wanted((5, 3), 0))
