"""Same-side columns against the oracle, and against a plain formula."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradcache import OBJECTIVES, Batch, DDPSync, NoSync, Temperature, Tower, cached_step, reference_step
from tests.gradcache.test_backends import SETTINGS, full_gradients
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks

STEP = SETTINGS | {"same_side": True}


def same_side_step(rank, rows, symmetric, objective):
    encoder, temperature = TinyEncoder(0, 0.2).train(), Temperature(0.1, learnable=True)
    group = dist.group.WORLD if len(rows) > 1 else None
    called = DistributedDataParallel(encoder, broadcast_buffers=False) if group else encoder
    result = cached_step(
        make_batch(rank, rows[rank], [called]),
        temperature=temperature,
        sync=DDPSync(called) if group else NoSync(),
        group=group,
        keep_graphs=1,
        symmetric=symmetric,
        **STEP | {"objective": OBJECTIVES[objective]},
    )
    return result.loss, full_gradients([encoder], temperature)


@pytest.mark.parametrize("rows", [(5,), (5, 3), (3, 0, 4)])
@pytest.mark.parametrize("symmetric, objective", [(False, "info_nce"), (True, "info_nce"), (True, "info_nce_multi")])
def test_same_side_gradients_are_the_references(rows, symmetric, objective):
    encoder, temperature = TinyEncoder(0, 0.2).train(), Temperature(0.1, learnable=True)
    batches = [make_batch(rank, n, [encoder]) for rank, n in enumerate(rows)]
    options = STEP | {"objective": OBJECTIVES[objective]}
    wanted = reference_step(batches, temperature=temperature, symmetric=symmetric, **options)
    for loss, found in run_ranks(same_side_step, len(rows), rows, symmetric, objective):
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert_same_gradients(found, full_gradients([encoder], temperature))


def test_the_loss_is_cross_entropy_over_both_sides():
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(8, 6), dim=1)
    q, p = rows.split(4)
    tower = Tower(encode=lambda x: x, lengths=torch.ones(8, dtype=torch.int64), load=lambda chosen: rows[chosen])
    keys = torch.arange(8)
    batch = Batch(towers=[tower], num_queries=4, keys=keys, target=torch.arange(4), positive_keys=keys[4:, None])
    found = cached_step(
        batch, temperature=Temperature(0.5), sync=NoSync(), group=None, keep_graphs=0, symmetric=True,
        **STEP | {"objective": OBJECTIVES["info_nce"]},
    )  # fmt: skip
    own = torch.full((4, 4), 0.0).fill_diagonal_(-torch.inf)
    forth = torch.cat([q @ p.T, q @ q.T + own], 1) / 0.5
    back = torch.cat([p @ q.T, p @ p.T + own], 1) / 0.5
    wanted = sum(torch.nn.functional.cross_entropy(scores, torch.arange(4)) for scores in (forth, back)) / 2
    assert found.loss == pytest.approx(float(wanted), rel=1e-6)
