"""Alignment and uniformity, which a contrastive loss reaches in the limit of many negatives, as a loss of their own.

Source: Wang and Isola 2020, arXiv 2005.10242.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from gradcache.objectives.parameters import Range
from gradcache.objectives.tile import FLOOR, LOG_SUM_EXP, SAME_SIDE, SUM, Objective, Rows, Tile, log_sum_exp


@dataclass(kw_only=True, eq=False)
class AlignmentUniformity(Objective):
    """Squared distance of a row to its positive, and the log of the mean Gaussian potential among the rows of its side.

    For unit vectors, with `same_side`.
    """

    merges = (LOG_SUM_EXP, SUM)
    batch_merges = (LOG_SUM_EXP, SUM)
    needs_same_side = True

    sharpness: Annotated[float, Range(0.01, 100, "2 in the paper")] = 2.0
    """t of the potential exp(-t d^2)."""
    weight: Annotated[float, Range(0, 100, "1 in the paper's listing")] = 1.0
    """Of the uniformity."""

    def statistics(self, tile: Tile) -> Tensor:
        """Return the log of the sum of potentials, and their number, (t, 2)."""
        is_own_side = tile.is_negative & (tile.kind_P == SAME_SIDE)
        potential_tP = torch.where(is_own_side, -self.sharpness * (2 - 2 * tile.scores_tP), FLOOR)
        return torch.stack([log_sum_exp(potential_tP), is_own_side.sum(1).to(potential_tP.dtype)], dim=1)

    def batch_statistics(self, rows: Rows) -> Tensor:
        """Return the same: potentials add up over the rows."""
        return rows.statistics_tS

    def loss(self, rows: Rows) -> Tensor:
        """Return the row's distance and the uniformity of all, (t,)."""
        assert rows.batch is not None, "this objective has batch_merges"
        log_sum, count = rows.batch
        uniformity = torch.where(count > 0, log_sum - count.clamp(min=1).log(), 0.0)
        return 2 - 2 * rows.positive_t + self.weight * uniformity
