"""InfoNCE with label smoothing: a small part of the target is spread over all columns, because some pairs are wrong.

Source: Szegedy et al. 2016 (arXiv 1512.00567); Jia et al. 2021 (ALIGN, arXiv 2102.05918).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from gradcache.objectives.info_nce import InfoNCE
from gradcache.objectives.parameters import Range
from gradcache.objectives.tile import SUM, Merge, Rows, Tile


@dataclass(kw_only=True, eq=False)
class LabelSmoothing(InfoNCE):
    """Cross entropy whose target is (1 - e) times the positive and e / columns everywhere."""

    joins = False

    smoothing: Annotated[float, Range(0, 0.99, "0.1 in ALIGN")] = 0.1
    """e, the part that is spread."""

    def __post_init__(self) -> None:
        """Raise ValueError for parameters that have no meaning together."""
        is_plain = self.positives == "own" and self.in_batch and self.hardest is None
        if not is_plain or self.hardness or self.mean_weight or self.focal:
            raise ValueError("the target is spread over all columns alike; expected none of InfoNCE's parameters but margin")
        super().__post_init__()

    @property
    def merges(self) -> tuple[Merge, ...]:  # type: ignore[override]
        """How the numbers of several tiles become those of all."""
        return (*super().merges, SUM, SUM)

    def statistics(self, tile: Tile) -> Tensor:
        """Return the logarithm of the sum over the negatives, the sum of their logits, and their number, (t, 3)."""
        count_t1 = tile.is_negative.sum(1, keepdim=True).to(tile.scores_tP.dtype)
        return torch.cat([super().statistics(tile), tile.sum(tile.logits)[:, None], count_t1], dim=1)

    def loss(self, rows: Rows) -> Tensor:
        """Return the cross entropy of each row, (t,)."""
        negatives_t, sum_t, count_t = rows.statistics_tS.unbind(1)
        positive_t = rows.scale * self._with_margin(rows.positive_t)
        mean_t = (sum_t + positive_t) / (count_t + 1)
        return torch.logaddexp(negatives_t, positive_t) - (1 - self.smoothing) * positive_t - self.smoothing * mean_t
