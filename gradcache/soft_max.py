"""The log-sum-exp of rows and its gradient in closed form, in plain torch: half the passes over a block that autograd makes.

Masked scores hold FLOOR, so that they weigh nothing; a row of nothing else has no negatives, and no gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradcache.objectives.tile import FLOOR

# b rows of a block, P columns


@dataclass(frozen=True)
class Largest:
    """The largest logit of each row, and its share of the row's soft-max.

    Weights that are made from the two add up to 1 to a rounding; those that are made from the log-sum-exp are off together by the
    rounding of a number near 10, which the gradient of a temperature, a difference of large numbers, shows.
    """

    logit_b: Tensor
    share_b: Tensor  # at least 1 / columns

    def log_sum_exp(self) -> Tensor:
        """Return the log-sum-exp of each row's logits, (b,)."""
        return self.logit_b - self.share_b.log()


def take_soft_max(score_bP: Tensor, exponent: Tensor, keeps: bool) -> Largest:
    """Return the largest entries of the soft-max of `exponent * scores`; keeps: it takes the place of the scores.

    exponent: the inverse temperature, more than it where hard negatives weigh more.
    """
    logits_bP = score_bP * exponent
    largest_b = logits_bP.amax(1)
    soft_max_bP = torch.softmax(logits_bP, 1, out=score_bP) if keeps else torch.softmax(logits_bP, 1)
    return Largest(largest_b, soft_max_bP.amax(1))


def put_gradient(values_bP: Tensor, exponent: Tensor, largest: Largest, factor_b: Tensor, is_soft_max: bool) -> None:
    """Put the gradient of the raw scores in the place of the scores, or of their soft-max.

    factor_b: the derivative of the loss to the log-sum-exp, times the inverse temperature.
    """
    factor_b = factor_b.masked_fill(largest.logit_b <= FLOOR / 2 * exponent, 0)
    if not is_soft_max:
        values_bP.mul_(exponent).sub_(largest.logit_b[:, None]).exp_()
        factor_b = factor_b * largest.share_b
    values_bP.mul_(factor_b[:, None])
