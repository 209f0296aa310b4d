"""Debiased contrastive learning: some of the negatives are positives that nobody has judged, and their part is taken out.

Source: Chuang et al. 2020, arXiv 2007.00224. With `hardness` and `mean_weight` it is the loss of Robinson et al. 2021
(arXiv 2010.04592), which HaSa has, too.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from gradcache.objectives.info_nce import InfoNCE, softplus
from gradcache.objectives.parameters import Range
from gradcache.objectives.tile import SUM, Merge, Rows, Tile


@dataclass(kw_only=True, eq=False)
class Debiased(InfoNCE):
    """InfoNCE whose sum over the negatives is corrected by the share of positives among them; for unit vectors."""

    joins = False

    positive_share: Annotated[float, Range(0, 0.99, "0.1 in the paper")] = 0.1
    """tau+: how many of the negatives are positives."""

    def __post_init__(self) -> None:
        """Raise ValueError for parameters that have no meaning together."""
        if self.positives != "own" or not self.in_batch or self.hardest is not None or self.hardness_of != "all":
            raise ValueError(
                'the correction is about all negatives of one positive; expected positives="own", hardness_of="all", '
                "in_batch=true and no hardest"
            )
        super().__post_init__()

    @property
    def merges(self) -> tuple[Merge, ...]:  # type: ignore[override]
        """How the numbers of several tiles become those of all."""
        return super().merges if self.mean_weight else (*super().merges, SUM)

    def statistics(self, tile: Tile) -> Tensor:
        """Return the logarithm of the sum over the negatives, those of InfoNCE's mean weight, and their number, (t, 2 or 3)."""
        found_tS = super().statistics(tile)
        if self.mean_weight:
            return found_tS
        return torch.cat([found_tS, tile.is_negative.sum(1, keepdim=True).to(found_tS.dtype)], dim=1)

    def loss(self, rows: Rows) -> Tensor:
        """Return the loss of each row, (t,)."""
        negatives_t, count_t = self.negatives(rows), rows.statistics_tS[:, -1].detach()
        positive_t = rows.scale * self._with_margin(rows.positive_t)
        # In logarithms, for the sums overflow at a temperature of 0.01.
        log_count_t = count_t.clamp(min=1).log()
        false_t = log_count_t + positive_t + (math.log(self.positive_share) if self.positive_share else -math.inf)
        is_more_t = negatives_t > false_t
        left_t = torch.where(is_more_t, false_t - negatives_t, -1.0)
        true_t = negatives_t + torch.log1p(-left_t.exp()) - math.log1p(-self.positive_share)
        least_t = log_count_t - rows.scale  # all of them at a cosine of -1
        corrected_t = torch.where(is_more_t & (true_t > least_t), true_t, least_t)
        corrected_t = torch.where(count_t > 0, corrected_t, negatives_t)
        return self._weighted(softplus(corrected_t - positive_t))
