"""Scores of pairs, summed in a fixed order."""

import numpy as np
import pytest
import torch

from trainer.encoder import pair_scores
from trainer.encoder.pair_scores import score_pairs


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_pair_scores_alike_whatever_stands_beside_it(dtype, monkeypatch):
    chance = torch.Generator().manual_seed(3)
    query_QD, passage_ND = (torch.randn(n, 77, generator=chance).to(dtype) for n in (9, 23))
    query_n, passage_n = (torch.randint(0, n, (200,), generator=chance) for n in (9, 23))
    together = score_pairs(query_QD, passage_ND, query_n, passage_n)
    expected = (query_QD.double()[query_n] * passage_ND.double()[passage_n]).sum(1)
    assert together.dtype == torch.float32
    np.testing.assert_allclose(together.numpy(), expected.numpy(), atol=1e-5)
    monkeypatch.setattr(pair_scores, "PAIRS_BYTES", 8 * 77 * 3)
    alone = torch.cat([score_pairs(query_QD, passage_ND, query_n[i : i + 1], passage_n[i : i + 1]) for i in range(200)])
    assert torch.equal(together, alone) and torch.equal(together, score_pairs(query_QD, passage_ND, query_n, passage_n))
