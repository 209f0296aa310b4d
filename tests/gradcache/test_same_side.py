"""Same-side columns against the oracle, and against a plain formula."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradcache import OBJECTIVES, DDPSync, LossOptions, NoSync, Temperature, cached_step, reference_step
from tests.gradcache.test_backends import SETTINGS, full_gradients
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.gradcache.vectors import step_of_vectors, vectors
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks

CASES = [  # symmetric, objective, what travels
    (symmetric, objective, gather)
    for symmetric, objective in [(False, "info_nce"), (True, "info_nce"), (True, "info_nce_multi")]
    for gather in ("passages", "queries")
]


def loss_of(symmetric, objective, gather="auto"):
    return LossOptions(objective=OBJECTIVES[objective], symmetric=symmetric, same_side=True, gather=gather)


def same_side_steps(rank, rows):
    group, found = dist.group.WORLD if len(rows) > 1 else None, []
    for case in CASES:
        encoder, temperature = TinyEncoder(0, 0.2).train(), Temperature(0.1, learnable=True)
        called = DistributedDataParallel(encoder, broadcast_buffers=False) if group else encoder
        result = cached_step(
            make_batch(rank, rows[rank], [called]),
            temperature=temperature,
            sync=DDPSync(called) if group else NoSync(),
            group=group,
            keep_graphs=1,
            loss=loss_of(*case),
            **SETTINGS,
        )
        found.append((result.loss, full_gradients([encoder], temperature)))
    return found


@pytest.mark.parametrize("rows", [(5,), (5, 3), (3, 0, 4)])
def test_same_side_gradients_are_the_references(rows):
    by_rank = run_ranks(same_side_steps, len(rows), rows)
    for number, (symmetric, objective, _) in enumerate(CASES):
        encoder, temperature = TinyEncoder(0, 0.2).train(), Temperature(0.1, learnable=True)
        batches = [make_batch(rank, n, [encoder]) for rank, n in enumerate(rows)]
        wanted = reference_step(batches, temperature=temperature, loss=loss_of(symmetric, objective), **SETTINGS)
        gradients = full_gradients([encoder], temperature)
        for loss, found in (of_rank[number] for of_rank in by_rank):
            assert loss == pytest.approx(wanted, rel=1e-5), CASES[number]
            assert_same_gradients(found, gradients)


def test_the_loss_is_cross_entropy_over_both_sides():
    torch.manual_seed(0)
    q, p = torch.nn.functional.normalize(torch.randn(8, 6), dim=1).split(4)
    found, _ = step_of_vectors(vectors(q, p), loss_of(True, "info_nce"), 2.0)
    own = torch.full((4, 4), 0.0).fill_diagonal_(-torch.inf)
    forth = torch.cat([q @ p.T, q @ q.T + own], 1) / 0.5
    back = torch.cat([p @ q.T, p @ p.T + own], 1) / 0.5
    wanted = sum(torch.nn.functional.cross_entropy(scores, torch.arange(4)) for scores in (forth, back)) / 2
    assert found.loss == pytest.approx(float(wanted), rel=1e-6)
