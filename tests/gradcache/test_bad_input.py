"""Bad input ends a step on every rank alike, in one sentence, before any gradient."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, LossOptions, NoSync, NotFinite, Ragged, Temperature, cached_step, siblings
from gradcache import tiles as tiles_module
from tests.gradcache.test_backends import LOSS, SETTINGS
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.gradcache.vectors import step_of_vectors, vectors
from tests.ranks import run_ranks

STEP = SETTINGS | {"loss": LOSS, "keep_graphs": 1}


class Broken(nn.Module):
    """Returns NaN for the texts of one rank, from a row on."""

    def __init__(self, encoder, is_broken):
        super().__init__()
        self.encoder, self.is_broken = encoder, is_broken

    def forward(self, inputs):
        embedding = self.encoder(inputs)
        return torch.where(inputs["input_ids"][:, :1] % 2 == 0, embedding * torch.nan, embedding) if self.is_broken else embedding


def broken_on_rank_1(rank):
    encoder = DistributedDataParallel(Broken(TinyEncoder(0, 0.0), rank == 1), broadcast_buffers=False)
    batch = make_batch(rank, 4, [encoder])
    try:
        cached_step(batch, temperature=Temperature(0.1), sync=DDPSync(encoder), group=dist.group.WORLD, **STEP)
    except NotFinite as error:
        assert all(p.grad is None for p in encoder.parameters())
        return error.rank, int(batch.keys[error.row]) == error.key, str(error)


def test_a_broken_embedding_is_named_on_every_rank_before_any_gradient():
    (rank0, _, words0), (rank1, is_its_key, words1) = run_ranks(broken_on_rank_1, 2)
    assert rank0 == rank1 == 1 and is_its_key and words0 == words1
    assert "of rank 1 (key " in words0 and "is not finite" in words0


def wider_on_rank_1(rank):
    encoders = [nn.Sequential(TinyEncoder(0, 0.0), nn.Linear(32, 32 if side == 0 or rank == 0 else 16)) for side in range(2)]
    rows = [0, 4][rank]  # rank 0 has nothing that could tell
    with pytest.raises(ValueError, match="widths 16 and 32; queries and passages need one width"):
        cached_step(make_batch(rank, rows, encoders), temperature=Temperature(0.1), sync=NoSync(), group=dist.group.WORLD, **STEP)


def test_unequal_widths_are_refused_on_every_rank():
    run_ranks(wider_on_rank_1, 2)


def test_scores_that_find_no_memory_are_computed_again(monkeypatch):
    torch.manual_seed(0)
    rows = vectors(torch.randn(6, 4), torch.randn(9, 4))
    loss, allocate, refused = LossOptions(gather="queries", tile_rows=2), torch.Tensor.new_empty, []
    wanted = step_of_vectors(rows, loss, 1.0)

    def new_empty(like, *size, **options):
        if size == (2, 9) and not refused:
            refused.append(size)
            raise RuntimeError("can't allocate memory")
        return allocate(like, *size, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    assert step_of_vectors(rows, loss, 1.0)[0].loss == wanted[0].loss and refused


def test_more_pairs_of_positives_than_can_be_listed_are_a_sentence(monkeypatch):
    monkeypatch.setattr(siblings, "MOST_SIBLINGS", 3)
    with pytest.raises(ValueError, match=r"would list \d+ pairs of a row and another of its positives, more than 3; .*info_nce"):
        cached_step(make_batch(0, 8, [TinyEncoder(0, 0.0)]), temperature=Temperature(0.1), sync=NoSync(), group=None, **STEP)


def test_a_tile_larger_than_memory_is_a_sentence(monkeypatch):
    allocate = torch.Tensor.new_empty

    def new_empty(like, *size, **options):
        if size == (2, 5):
            raise RuntimeError("can't allocate memory")
        return allocate(like, *size, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    loss = LossOptions(objective=LOSS.objective, tile_rows=2)
    with pytest.raises(ValueError, match=r"a tile of tile_rows=2 x 5 columns takes .* set tile_rows lower"):
        step_of_vectors(vectors(torch.randn(3, 4), torch.randn(5, 4)), loss, 1.0)
    assert tiles_module.TILE_BYTES["cpu"] <= 2**28, "three times this and the embeddings are what a loss may hold"


def test_positives_that_do_not_fit_the_queries_are_refused_and_uneven_numbers_are_not():
    batch, found = vectors(torch.randn(3, 4), torch.randn(5, 4)), []
    table = torch.tensor([[3, 6], [4, 4], [5, 5]])
    for positive_keys in (table, Ragged(torch.tensor([6, 4]), torch.tensor([1, 1, 0]))):  # a target needs no naming
        step = step_of_vectors(replace(batch, positive_keys=positive_keys), LOSS, 1.0)[0]
        found.append((step.loss, step.share_masked))
    assert found[0] == found[1] and found[0][1] == 1 / 15
    with pytest.raises(ValueError, match=r"batch\.target has 3 and batch\.positive_keys 2 entries, expected one for each"):
        replace(batch, positive_keys=table[:2])
    with pytest.raises(ValueError, match=r"batch has 2 values of positive_keys, expected 3"):
        replace(batch, positive_keys=Ragged(torch.tensor([6, 4]), torch.tensor([1, 1, 1])))


def test_all_columns_masked_is_a_loss_of_zero_and_zero_gradients():
    encoder = TinyEncoder(0, 0.0)
    batch = make_batch(0, 3, [encoder])
    everything = batch.keys[None].expand(3, -1).clone()
    batch = replace(batch, positive_keys=everything)
    result = cached_step(batch, temperature=Temperature(0.1), sync=NoSync(), group=None, **STEP)
    assert result.loss == pytest.approx(0, abs=1e-6) and result.share_masked > 0.5
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-6 for p in encoder.parameters())
