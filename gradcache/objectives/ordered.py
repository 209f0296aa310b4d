"""Losses of pairs with grades: what is more alike by its grade is to score higher, among all pairs of the batch.

A query and its positive are such a pair, the grade is a value of the row, and nobody else's passage is looked at. The order of
all ranks' pairs makes the loss: two numbers of each pair travel, and sorting them replaces the comparison of every two.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradcache.objectives.tile import Objective, Rows, Tile

# t rows, Q rows of all ranks, B rows of this rank, w width


@dataclass(kw_only=True, eq=False)
class CoSENT(Objective):
    """log(1 + sum of exp((s_low - s_high) / temperature)) over all two pairs of which one has the higher grade.

    Source: Su 2022 (kexue.fm/archives/8847), which sentence-transformers' CoSENTLoss follows.
    """

    gathered_width = 2
    row_values = ("grade",)
    sees_columns = False

    def statistics(self, tile: Tile) -> Tensor:
        """Return none, (t, 0)."""
        return tile.scores_tP[:, :0]

    def batch_statistics(self, rows: Rows) -> Tensor:
        """Return the score and the grade of each pair, (t, 2)."""
        return torch.stack([rows.positive_t, rows.values["grade"].to(rows.positive_t)], dim=1)

    def loss(self, rows: Rows) -> Tensor:
        """Return the loss of the batch for each row, (t,)."""
        assert rows.batch is not None, "this objective gathers its rows"
        return _order_loss(rows.batch[:, 0], rows.batch[:, 1], rows.scale).expand(len(rows.positive_t))


@dataclass(kw_only=True, eq=False)
class AnglE(CoSENT):
    """CoSENT of the angle between two texts, whose halves are the real and imaginary parts of a complex vector.

    Source: Li and Li 2023, arXiv 2309.12871.
    """

    has_pair_scores = True

    def pair_scores(self, row_Bw: Tensor, positive_Bw: Tensor) -> Tensor:
        """Return the absolute sum of the quotient's parts, of vectors of length 1, (B,). Raises ValueError for an odd width."""
        if row_Bw.shape[1] % 2:
            raise ValueError(f"AnglE halves embeddings, and these have {row_Bw.shape[1]} components; expected an even number")
        a, b = row_Bw.chunk(2, dim=1)
        c, d = positive_Bw.chunk(2, dim=1)
        length_B = row_Bw.norm(dim=1) * positive_Bw.norm(dim=1)
        return ((a * c + b * d + b * c - a * d).sum(1) / length_B).abs()


@dataclass(kw_only=True, eq=False)
class Correlation(CoSENT):
    """1 - the correlation of scores and grades over the batch: Pearson's, or of the grades' ranks.

    Source: the order-aware part of CoDiEmb (2025, arXiv 2508.11442), of which this is the linear one.
    """

    of: Literal["grades", "ranks"] = "grades"
    """What scores are correlated with; ranks are the mean ones of equal grades."""

    def loss(self, rows: Rows) -> Tensor:
        """Return the loss of the batch for each row, (t,); 1 where all scores or all grades are one."""
        assert rows.batch is not None, "this objective gathers its rows"
        score_Q, grade_Q = rows.batch.unbind(1)
        grade_Q = grade_Q.detach() if self.of == "grades" else _mean_ranks(grade_Q.detach())
        score_Q, grade_Q = score_Q - score_Q.mean(), grade_Q - grade_Q.mean()
        length = (score_Q.square().sum() * grade_Q.square().sum()).sqrt()
        is_flat = length.detach() == 0
        correlation = torch.where(is_flat, 0.0, (score_Q * grade_Q).sum() / torch.where(is_flat, 1.0, length))
        return (1 - correlation).expand(len(rows.positive_t))


def _order_loss(score_Q: Tensor, grade_Q: Tensor, scale: Tensor) -> Tensor:
    """Return log(1 + sum of exp(scale (s_i - s_j))) over all i, j with grade_i < grade_j."""
    grade_Q, order_Q = grade_Q.detach().sort(stable=True)
    logit_Q = scale * score_Q[order_Q]
    below_Q = torch.searchsorted(grade_Q, grade_Q)  # how many have a lower grade
    # Log-sum-exp of the first i logits; of none of them minus infinity.
    lower = torch.cat([logit_Q.new_full((1,), -torch.inf), logit_Q.logcumsumexp(0)])[below_Q]
    has_lower_Q = below_Q > 0
    terms_Q = torch.where(has_lower_Q, torch.where(has_lower_Q, lower, 0) - logit_Q, -torch.inf)
    return torch.cat([terms_Q, logit_Q.new_zeros(1)]).logsumexp(0)


def _mean_ranks(values_Q: Tensor) -> Tensor:
    """Return the rank of each value, the mean one where several are equal."""
    _, number_Q, count = values_Q.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return (last - (count - 1) / 2).to(values_Q)[number_Q]
