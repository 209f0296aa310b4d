"""InfoNCE with one positive or with all judged positives of a row.

Source: van den Oord et al. 2018 (arXiv 1807.03748); in-batch negatives as in Karpukhin et al. 2020 (arXiv 2004.04906);
several positives, each against the negatives alone, as in Khosla et al. 2020 (arXiv 2004.11362), L_out, but with the
other positives left out of the denominator.
"""

from typing import ClassVar

import torch
from torch import Tensor

from gradcache.objectives.tile import LOG_SUM_EXP, Objective, Rows, Tile, log_sum_exp


class InfoNCE(Objective):
    """-log softmax of each row's own positive among it and the negatives."""

    merges = (LOG_SUM_EXP,)
    is_soft_max = True

    def statistics(self, tile: Tile) -> Tensor:
        """Return the logarithm of the sum over the negatives, (t, 1)."""
        return log_sum_exp(tile.logits)[:, None]

    def loss(self, rows: Rows) -> Tensor:
        """Return log(1 + exp(negatives - positive)), (t,), which is 0 for a row without negatives."""
        return softplus(_negatives(rows) - rows.scale * rows.positive_t)


class MultiPositiveInfoNCE(InfoNCE):
    """The mean over a row's positives of -log softmax of each among itself and the negatives."""

    wants_siblings: ClassVar[bool] = True

    def loss(self, rows: Rows) -> Tensor:
        """Return the mean over a row's own positive and the siblings in the pool, (t,)."""
        is_sibling = rows.cells.kind_c == 0
        row = torch.cat([torch.arange(len(rows.positive_t), device=rows.positive_t.device), rows.cells.row_c])
        score = torch.cat([rows.positive_t, rows.cells.score_c])
        weight = torch.cat([torch.ones_like(rows.positive_t), is_sibling.to(score.dtype)])
        loss = softplus(_negatives(rows)[row] - rows.scale * score) * weight
        sums = loss.new_zeros(2, len(rows.positive_t)).index_add(1, row, torch.stack([loss, weight]))
        return sums[0] / sums[1]


def softplus(values: Tensor) -> Tensor:
    """Return log(1 + exp(values)), exact also where torch's own takes a shortcut."""
    return torch.logaddexp(values, values.new_zeros(()))


def _negatives(rows: Rows) -> Tensor:
    return rows.statistics_tS[:, 0]
