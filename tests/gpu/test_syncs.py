"""How often the host waits for the GPU in a training step, as torch counts it."""

import contextlib
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from gradcache import Batch, LossOptions, NoSync, Temperature, Tower, agree, cached_step, masks, siblings
from gradcache.transfers import upload
from tests.gradcache.named import NAMED
from tests.trainer.test_update import run_of
from tests.trainer.worlds import world_of
from trainer.job import ParallelSettings
from trainer.update import update

pytestmark = pytest.mark.gpu
NUM_QUERIES, FEATURES, WIDTH = 96, 8, 16


class Encoder(nn.Module):
    """A linear map with dropout to unit vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = nn.Linear(FEATURES, WIDTH), nn.Dropout(0.1)

    def forward(self, inputs):
        return normalize(self.dropout(self.linear(inputs)), dim=1)


def batch_of(encode):
    """Return queries of few texts with two positives each, and two passages a query; the rows lie on the GPU."""
    num_rows = 3 * NUM_QUERIES
    table = torch.randn(num_rows, FEATURES, generator=torch.Generator().manual_seed(1)).cuda()
    keys = torch.cat([torch.arange(NUM_QUERIES) % 40, 1000 + torch.arange(2 * NUM_QUERIES) % 150])
    target = torch.arange(NUM_QUERIES)
    own = keys[NUM_QUERIES:][target]
    lengths = torch.ones(num_rows, dtype=torch.int64)
    tower = Tower(encode=encode, lengths=lengths, load=lambda rows: table[upload(rows, table.device)])
    positive_keys = torch.stack([own, 1000 + (own + 1) % 150], dim=1)
    return Batch(towers=[tower], num_queries=NUM_QUERIES, keys=keys, target=target, positive_keys=positive_keys)


def take_step(encoder, temperature, name, gather, chunk_tokens, tile_rows, widths):
    loss = LossOptions(objective=NAMED[name], symmetric=True, same_side=True, gather=gather, tile_rows=tile_rows, widths=widths)
    return cached_step(
        batch_of(encoder), loss=loss, temperature=temperature, sync=NoSync(encoder), group=None, chunk_tokens=chunk_tokens,
        keep_graphs=1, seed=0, step=0,
    )  # fmt: skip


@contextlib.contextmanager
def watched(mode):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_of(call):
    """Return where the host waits while something is called, and what the call returns."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with watched("warn"):
            found = call()
    return [f"{each.filename}:{each.lineno}" for each in told if "called a synchronizing" in str(each.message)], found


SIZES = [(1000, None, None), (20, 16, None), (7, 5, (16, 8, 4))]  # tokens of a chunk, rows of a tile, widths


@pytest.mark.parametrize("gather", ["passages", "queries"])
@pytest.mark.parametrize(("name", "num_waits"), [("info_nce", 2), ("info_nce_multi", 3)])
def test_a_step_waits_as_often_whatever_its_chunks_tiles_and_widths(name, num_waits, gather):
    encoder, temperature = Encoder().cuda().train(), Temperature(0.1, learnable=True).cuda()
    for sizes in SIZES:
        take_step(encoder, temperature, name, gather, *sizes)  # kernels are built at their first use
        waits, result = waits_of(lambda sizes=sizes: take_step(encoder, temperature, name, gather, *sizes))
        assert len(waits) == num_waits, (sizes, waits)
        assert result.loss > 0 and min(result.encode_s, result.loss_s, result.backward_s) > 0


@pytest.mark.parametrize("gather", ["passages", "queries"])
def test_no_chunk_and_no_tile_waits_at_all(gather, monkeypatch):
    def allowed(call):
        def waiting(*args):
            torch.cuda.set_sync_debug_mode("default")
            try:
                return call(*args)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        return waiting

    encoder, temperature = Encoder().cuda().train(), Temperature(0.1, learnable=True).cuda()
    take_step(encoder, temperature, "info_nce_multi", gather, *SIZES[2])
    monkeypatch.setattr(agree, "gather_integers", allowed(agree.gather_integers))
    for module in (masks, siblings):
        monkeypatch.setattr(module, "read_together", allowed(module.read_together))
    with watched("error"):
        result = take_step(encoder, temperature, "info_nce_multi", gather, *SIZES[2])
    assert result.num_chunks > 10 and result.loss > 0


@pytest.mark.parametrize("has_scaler", [False, True], ids=["float32", "float16"])
def test_an_update_waits_once(has_scaler):
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0) if has_scaler else None
    world = replace(world_of(), device=torch.device("cuda"))
    run: SimpleNamespace = run_of(world, ParallelSettings(), scaler)
    state, temperature = run.state, run.state.temperature.cuda()
    state.loss_optimizer = torch.optim.AdamW(temperature.parameters(), lr=1e-2, weight_decay=0.0)

    def updated():
        return update(run)

    for number in range(3):
        for parameter in (*state.parallel.trained().values(), temperature.log_scale):
            parameter.grad = torch.full_like(parameter, 0.1)
        if scaler is not None:
            scaler.scale(torch.ones((), device="cuda"))  # makes its tensors
        waits, norm = waits_of(updated)
        assert norm > 0 and state.num_skipped == 0
        assert number == 0 or len(waits) == 1, waits  # the optimizers make their states first
