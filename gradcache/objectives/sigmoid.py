"""The sigmoid loss: each pair is a yes-or-no question of its own, and no soft-max couples the columns.

Source: Zhai et al. 2023 (SigLIP), arXiv 2303.15343.
"""

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from gradcache.objectives.parameters import Range
from gradcache.objectives.tile import SUM, Objective, Rows, Tile


class Sigmoid(nn.Module, Objective):
    """The sum over a row's pairs of the logistic loss, with a learnt bias."""

    merges = (SUM,)

    def __init__(self, *, bias: Annotated[float, Range(-100, 100, "-10 in SigLIP")] = -10.0):
        """bias: of all logits at the start."""
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def statistics(self, tile: Tile) -> Tensor:
        """Return the sum over the negatives, (t, 1)."""
        return -tile.sum(logsigmoid(-tile.logits - self.bias))[:, None]

    def loss(self, rows: Rows) -> Tensor:
        """Return the sum over the row's pairs, (t,)."""
        return rows.statistics_tS[:, 0] - logsigmoid(rows.scale * rows.positive_t + self.bias)
