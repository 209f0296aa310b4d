"""Relevance margins that the encoder takes from its own passages: no teacher, and a margin for each pair.

Source: Gienapp et al. 2024, arXiv 2407.21515.
"""

import torch
from torch import Tensor

from gradcache.objectives.tile import SUM, Objective, Rows, Tile


class AdaptiveMargins(Objective):
    """The lead of the positive over a negative is to be their own distance: no teacher, and a margin for each pair.

    Source: Gienapp et al. 2024, arXiv 2407.21515.
    """

    merges = (SUM, SUM)
    second = "positive"
    returns_positive = True

    def statistics(self, tile: Tile) -> Tensor:
        """Return the sum of squared errors of the leads, and the number of negatives, (t, 2)."""
        assert tile.second_tP is not None, "this objective asks for the positives' matrix"
        error_tP = tile.positive_t[:, None] - tile.scores_tP - (1 - tile.second_tP)
        return torch.stack([tile.sum(error_tP.square()), tile.sum(torch.ones_like(error_tP))], dim=1)

    def loss(self, rows: Rows) -> Tensor:
        """Return the mean squared error of each row, (t,)."""
        return rows.statistics_tS[:, 0] / rows.statistics_tS[:, 1].clamp(min=1)
