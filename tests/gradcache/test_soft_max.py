"""Rows of the soft-max kind in closed form, against autograd through the same statistics."""

import pytest
import torch

import gradcache.blocks
from gradcache.masks import Masks
from gradcache.matrix import Matrix
from gradcache.objectives.info_nce import InfoNCE
from gradcache.objectives.tile import FLOOR, log_sum_exp
from gradcache.tiles import Tiles

ROWS, SCALE = 13, 20.0
ONE_TILE = 5 * 37 * 8  # bytes


class ByAutograd(InfoNCE):
    is_soft_max = False


def matrix(num_columns, repeated=()):
    torch.manual_seed(0)
    rows, columns = (torch.randn(n, 6, dtype=torch.float64) for n in (ROWS, num_columns))
    return Matrix(
        row_RD=torch.nn.functional.normalize(rows, dim=1),
        column_PD=torch.nn.functional.normalize(columns, dim=1),
        kind_P=torch.zeros(num_columns, dtype=torch.int8),
        masks=Masks(torch.tensor(repeated, dtype=torch.int64), []),
        scale=torch.tensor(SCALE, dtype=torch.float64),
        positive_R=torch.zeros(ROWS, dtype=torch.float64),
    )


def gradients(matrix, objective, keep_bytes, derivative_R1):
    """Return the statistics and the gradients; keep_bytes: of two phases, None: one sweep."""
    tiles, seen = Tiles(matrix, objective, tile_rows=5, may_fuse=False), []
    if keep_bytes is not None:
        seen.append(tiles.statistics(keep_bytes)[0])

    def derivative(rows, statistics_b1):
        if keep_bytes is None:
            seen.append(statistics_b1.clone())
        return derivative_R1[rows]

    found = tiles.gradients(derivative)
    return torch.cat(seen), found


@pytest.mark.parametrize("repeated", [(), (0, 7), tuple(range(37))], ids=["no mask", "two masked", "all masked"])
@pytest.mark.parametrize("keep_bytes", [None, 0, ONE_TILE, 10**9], ids=["one sweep", "again", "one tile kept", "kept"])
def test_closed_form_equals_autograd(monkeypatch, keep_bytes, repeated):
    monkeypatch.setitem(gradcache.blocks.BLOCK_BYTES, "cpu", 2 * 37 * 8)
    derivative_R1 = torch.linspace(-1, 2, ROWS, dtype=torch.float64)[:, None]
    (expected, by_autograd), (actual, closed) = (
        gradients(matrix(37, repeated), objective, keep_bytes, derivative_R1) for objective in (ByAutograd(), InfoNCE())
    )
    torch.testing.assert_close(actual, expected)
    is_masked = len(repeated) == 37
    assert bool(by_autograd.row_RD.abs().max() > 0.1) != is_masked, "a gradient is there exactly where there are negatives"
    for name in ("row_RD", "column_PD", "scale"):
        torch.testing.assert_close(getattr(closed, name), getattr(by_autograd, name), rtol=1e-10, atol=1e-12)


def test_without_columns_there_is_no_gradient():
    statistics, found = gradients(matrix(0), InfoNCE(), 0, torch.ones(ROWS, 1, dtype=torch.float64))
    assert bool((statistics <= FLOOR / 2 * SCALE).all()) and found.column_PD is None and not found.row_RD.any()


def test_a_subclass_with_other_statistics_is_not_of_the_soft_max_kind():
    class Doubled(InfoNCE):
        def statistics(self, tile):
            return 2 * log_sum_exp(tile.logits_tP)[:, None]

    class Weighted(InfoNCE):
        def loss(self, rows):
            return 2 * super().loss(rows)

    assert not Doubled.is_soft_max and Weighted.is_soft_max and InfoNCE.is_soft_max
