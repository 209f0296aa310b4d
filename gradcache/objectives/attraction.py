"""Contrastive attraction and repulsion: positives and negatives are compared within their groups first.

Source: Zheng et al. 2021, arXiv 2105.03746.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from gradcache.objectives.info_nce import positives_of
from gradcache.objectives.parameters import Range
from gradcache.objectives.tile import FLOOR, Objective, Rows, Tile, weighted_mean


@dataclass(kw_only=True, eq=False)
class CACR(Objective):
    """The mean squared distance of the positives, where the farther weigh more, less that of the negatives, where the nearer do.

    For unit vectors. The weights are not stopped: they have a gradient, as in the paper's listing.
    """

    merges = (weighted_mean(1),)
    wants_siblings = True

    attraction: Annotated[float, Range(0, 10, "1 in the paper")] = 1.0
    """t+, which sharpens the weights of the positives."""
    repulsion: Annotated[float, Range(0, 10, "2 in the paper")] = 2.0
    """t-, which sharpens the weights of the negatives."""

    def statistics(self, tile: Tile) -> Tensor:
        """Return the log of the sum of the negatives' weights, and their mean squared distance, (t, 2)."""
        is_negative = tile.is_negative
        distance_tP = torch.where(is_negative, 2 - 2 * tile.scores_tP, 0)
        log_weight_tP = torch.where(is_negative, -self.repulsion * distance_tP, FLOOR)
        mean_t = (torch.softmax(log_weight_tP, 1) * distance_tP).sum(1)
        return torch.stack([torch.logsumexp(log_weight_tP, 1), mean_t], dim=1)

    def loss(self, rows: Rows) -> Tensor:
        """Return the weighted distance of the positives less that of the negatives, (t,)."""
        row_m, score_m = positives_of(rows)
        distance_m = 2 - 2 * score_m
        weight_m = (self.attraction * distance_m).exp()  # distances are at most 4
        num_rows = len(rows.positive_t)
        sums = distance_m.new_zeros(2, num_rows + 1).index_add(1, row_m, torch.stack([weight_m * distance_m, weight_m]))
        return sums[0, :num_rows] / sums[1, :num_rows] - rows.statistics_tS[:, 1]
