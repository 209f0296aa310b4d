"""Decoupled contrastive learning: the positive is no part of the denominator, so that an easy one weakens no negative's pull.

Source: Yeh et al. 2022, arXiv 2110.06848.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from gradcache.objectives.info_nce import InfoNCE
from gradcache.objectives.parameters import Range
from gradcache.objectives.tile import FLOOR, LOG_SUM_EXP, SUM, Rows


@dataclass(kw_only=True, eq=False)
class DCL(InfoNCE):
    """The log-sum-exp of the negatives less the positive's logit; 0 for a row without negatives."""

    joins = False

    def __post_init__(self) -> None:
        """Raise ValueError for parameters that have no meaning together."""
        if self.positives == "supcon":
            raise ValueError('positives="supcon" is about what the denominator holds; expected "own", "mean" or "sum"')
        if self.focal:
            raise ValueError(f"focal={self.focal} weighs by a probability, which this loss has none of; expected 0")
        super().__post_init__()

    def of_positive(self, negatives: Tensor, positive: Tensor) -> Tensor:
        """Return the loss of positives, given the logarithms of their negatives' sums and their own logits."""
        return torch.where(negatives.detach() > FLOOR / 2, negatives - positive, 0)

    def negatives(self, rows: Rows) -> Tensor:
        """Return the logarithm of the weighted sum over each row's negatives, (t,), FLOOR where there are none."""
        negatives_t = super().negatives(rows)
        return torch.where(self.has_negatives(rows, negatives_t), negatives_t, FLOOR)


@dataclass(kw_only=True, eq=False)
class DCLW(DCL):
    """DCL whose positives weigh the more the farther they are: 2 - exp(s / sigma), over the mean of that in the batch."""

    batch_merges = (LOG_SUM_EXP, SUM)

    sigma: Annotated[float, Range(0.01, 10, "0.5 in the paper")] = 0.5
    """Of the positives' scores in the weights, which have no gradient."""

    def __post_init__(self) -> None:
        """Raise ValueError for parameters that have no meaning together."""
        if self.positives != "own" or self.margin:
            raise ValueError('weights are those of the row\'s own positive; expected positives="own" and margin=0')
        super().__post_init__()

    def batch_statistics(self, rows: Rows) -> Tensor:
        """Return the logarithm of what a positive adds to the sum, and a count, (t, 2)."""
        return torch.stack([rows.positive_t.detach() / self.sigma, torch.ones_like(rows.positive_t)], dim=1)

    def loss(self, rows: Rows) -> Tensor:
        """Return the loss of each row, (t,)."""
        assert rows.batch is not None, "this objective has batch_merges"
        log_mean = rows.batch[0].detach() - rows.batch[1].detach().log()
        weight_t = 2 - (rows.positive_t.detach() / self.sigma - log_mean).exp()
        return self.of_positive(self.negatives(rows), weight_t * rows.scale * rows.positive_t)
