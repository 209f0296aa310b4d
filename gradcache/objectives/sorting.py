"""GroCo: the positive and the hardest negatives are sorted by a differentiable network, and the positive is to come out on top.

Source: Shvetsova et al. 2023, arXiv 2301.02009; the network is the odd-even one of Petersen et al. 2021 (arXiv 2105.04019) with
Cauchy's distribution, of which two neighbours are swapped with the probability that they stand in the wrong order.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from gradcache.objectives.parameters import Range
from gradcache.objectives.tile import FLOOR, Merge, Objective, Rows, Tile, top_k

# t rows, k negatives, n = k + 1 sorted scores


@dataclass(kw_only=True, eq=False)
class GroCo(Objective):
    """Binary cross entropy of the probabilities that the sorted scores leave the positive on top and the negatives below."""

    hardest: Annotated[int, Range(1, 100, "10 in the paper")] = 10
    """Negatives of a row that are sorted."""
    steepness: Annotated[float, Range(0.01, 1000, "1 in the paper's code")] = 1.0
    """Of a swap's probability in the difference of two logits."""

    @property
    def merges(self) -> tuple[Merge, ...]:  # type: ignore[override]
        """How the numbers of several tiles become those of all."""
        return (top_k(self.hardest),)

    def statistics(self, tile: Tile) -> Tensor:
        """Return the k highest scores, FLOOR where there are fewer, (t, k)."""
        highest = tile.scores_tP.topk(min(self.hardest, tile.scores_tP.shape[1]), dim=1).values
        return torch.nn.functional.pad(highest, (0, self.hardest - highest.shape[1]), value=FLOOR)

    def loss(self, rows: Rows) -> Tensor:
        """Return the loss of each row, (t,)."""
        # From the lowest to the highest, as the paper orders them before it sorts.
        score_tn = torch.cat([rows.statistics_tS.flip(1), rows.positive_t[:, None]], dim=1)
        on_top_tn = _probability_on_top(self.steepness * rows.scale * score_tn).clamp(0, 1)
        wanted_tn = torch.zeros_like(on_top_tn)
        wanted_tn[:, -1] = 1
        loss_tn = torch.nn.functional.binary_cross_entropy(on_top_tn, wanted_tn, reduction="none")
        return torch.where(rows.statistics_tS[:, 0].detach() > FLOOR / 2, loss_tn.mean(1), 0)


def _probability_on_top(score_tn: Tensor) -> Tensor:
    """Return the probability that each of n scores is the highest, as a sorting network of n layers has it, (t, n)."""
    num = score_tn.shape[1]
    permutation_tnn = torch.eye(num, dtype=score_tn.dtype, device=score_tn.device).expand(len(score_tn), num, num)
    for layer in range(num):
        low = torch.arange(layer % 2, num - 1, 2, device=score_tn.device)
        first_tp, second_tp = score_tn[:, low], score_tn[:, low + 1]
        in_order_tp = torch.atan(second_tp - first_tp) / torch.pi + 0.5
        score_tn = _swapped(score_tn, in_order_tp, low)
        permutation_tnn = _swapped(permutation_tnn, in_order_tp[:, None], low)
    return permutation_tnn[..., -1]


def _swapped(values: Tensor, in_order: Tensor, low: Tensor) -> Tensor:
    """Return values whose neighbours `low` and `low + 1` are mixed, by the probability that they stand in order."""
    first, second = values[..., low], values[..., low + 1]
    mixed = values.clone()
    mixed[..., low] = in_order * first + (1 - in_order) * second
    mixed[..., low + 1] = (1 - in_order) * first + in_order * second
    return mixed
