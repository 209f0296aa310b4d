"""What a GPU would hold for the gradient of a matrix: the same code on tensors without values, every allocation counted."""

import pytest
import torch

from gradcache import InfoNCE, fused, tiles
from gradcache.masks import Masks
from gradcache.matrix import Matrix
from gradcache.products import COLUMNS_AT_ONCE
from gradcache.soft_max import Largest
from gradcache.tiles import FEWEST_ROWS, Tiles
from tests.allocator import Memory

ROWS, COLUMNS, WIDTH = FEWEST_ROWS["cuda"], 2**20, 768


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Let kernels and products that want a GPU return tensors of the sizes that theirs have there."""
    monkeypatch.setattr(fused, "can_fuse", lambda scores: True)
    monkeypatch.setattr(fused, "row_largest", lambda scores, scale: Largest(*scores.new_empty(2, len(scores))))
    monkeypatch.setattr(fused, "soft_max_gradient", lambda scores, scale, largest, gradient, out: out)

    def product(left, right, out=None):
        return left.new_empty(len(left), right.shape[1], dtype=torch.float32) if out is None else out

    monkeypatch.setattr(tiles, "product", product)
    monkeypatch.setattr("gradcache.products.product", product)
    monkeypatch.setattr(tiles, "for_products", lambda values: values)


def test_a_million_columns_hold_their_gradient_and_one_tile(on_a_gpu):
    with torch.device("meta"), Memory() as memory:
        query, passage = (torch.empty(n, WIDTH, dtype=torch.bfloat16) for n in (ROWS, COLUMNS))
        matrix = Matrix(
            row_RD=query,
            column_PD=passage,
            kind_P=torch.zeros(COLUMNS, dtype=torch.int8),
            masks=Masks(torch.zeros(0, dtype=torch.int64), []),
            scale=torch.tensor(0.05),
            positive_R=torch.zeros(ROWS),
        )
        before = memory.live
        found = Tiles(matrix, InfoNCE(), FEWEST_ROWS["cuda"]).gradients(lambda rows, statistics: statistics)
        gradient, tile = COLUMNS * WIDTH * 4, ROWS * COLUMNS * (4 + 2)  # scores in float32, their gradient in bfloat16
        assert found.column_PD.nbytes == gradient
        assert gradient + tile < memory.peak - before < gradient + tile + 1.5 * COLUMNS_AT_ONCE * WIDTH * 4
