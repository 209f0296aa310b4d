"""InfoNCE with a temperature for each pair, which is learnt as a function of the pair's own score.

The idea is that of Wang et al. 2024 (AMCL), arXiv 2310.05615: a similar pair may need another temperature than a distant one, and
a regulariser keeps temperatures from running away. There a small network of both texts gives the temperature; here, where a tile
of scores is all that is seen, two learnt numbers and the score do.
"""

from typing import Annotated

import torch
from torch import Tensor, nn

from gradcache.objectives.info_nce import softplus
from gradcache.objectives.parameters import Range
from gradcache.objectives.tile import FLOOR, LOG_SUM_EXP, SUM, Objective, Rows, Tile, log_sum_exp


class PairTemperature(nn.Module, Objective):
    """-log soft-max of scores over their own temperatures, each around the run's; and their regulariser."""

    merges = (LOG_SUM_EXP, SUM, SUM)

    def __init__(
        self,
        *,
        spread: Annotated[float, Range(1.01, 100)] = 4.0,
        regularizer: Annotated[float, Range(0, 10, "0.1 in the authors' settings")] = 0.1,
    ):
        """spread: a pair's temperature is at least 1 / spread and at most spread times the run's. regularizer: its weight."""
        super().__init__()
        self.spread, self.regularizer = spread, regularizer
        self.slope = nn.Parameter(torch.tensor(0.0))
        self.offset = nn.Parameter(torch.tensor(0.0))

    def statistics(self, tile: Tile) -> Tensor:
        """Return the logarithm of the sum over the negatives, the regulariser's sum and their number, (t, 3)."""
        is_negative, log_tP = tile.is_negative, self._log_temperature(tile.scores_tP)
        sum_t = log_sum_exp(torch.where(is_negative, tile.logits * (-log_tP).exp(), FLOOR))
        return torch.stack([sum_t, tile.sum(self._regularizer(log_tP)), is_negative.sum(1).to(sum_t.dtype)], dim=1)

    def loss(self, rows: Rows) -> Tensor:
        """Return the loss of each row, (t,)."""
        negatives_t, sum_t, count_t = rows.statistics_tS.unbind(1)
        log_t = self._log_temperature(rows.positive_t)
        positive_t = rows.scale * rows.positive_t * (-log_t).exp()
        mean_t = (sum_t + self._regularizer(log_t)) / (count_t + 1)
        return softplus(negatives_t - positive_t) + self.regularizer * mean_t

    def _log_temperature(self, scores: Tensor) -> Tensor:
        """Return the logarithm of each pair's temperature over the run's."""
        most = torch.log(torch.as_tensor(self.spread, dtype=scores.dtype, device=scores.device))
        return most * torch.tanh(self.slope.to(scores.dtype) * scores + self.offset.to(scores.dtype))

    def _regularizer(self, log_temperature: Tensor) -> Tensor:
        """Return log T + 1 / T - 1, which is 0 where a pair has the run's temperature, and more elsewhere."""
        return log_temperature + (-log_temperature).exp() - 1
