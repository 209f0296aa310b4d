"""InfoNCE, with what published systems change about it: several positives, margins, weights of negatives and of rows.

Each change is a parameter, so that one job may have several of them: RzenEmbed's weights with a focal weight of rows, say.

Source: van den Oord et al. 2018 (arXiv 1807.03748); in-batch negatives as in Karpukhin et al. 2020 (arXiv 2004.04906). The
sources of the parameters stand beside them.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from gradcache.objectives.parameters import Range
from gradcache.objectives.tile import (
    CANDIDATE,
    FLOOR,
    LOG_SUM_EXP,
    SIBLING,
    SUM,
    Merge,
    Objective,
    Rows,
    Tile,
    log_sum_exp,
    top_k,
)

# t rows, P columns of a tile, k hardest ones, m positives of all rows, c cells


@dataclass(kw_only=True, eq=False)
class InfoNCE(Objective):
    """-log soft-max of each row's positive among it and the negatives."""

    joins = True

    positives: Literal["own", "mean", "sum", "supcon"] = "own"
    """Of several judged positives in the pool: the row's own one alone; the mean of the losses of each, the others left out; one
    positive whose weight is the sum of theirs; or as the mean, the others in the denominator (Khosla et al. 2020, L_out).
    """
    margin: Annotated[float, Range(0, 1.6, "0.4 in Zhu et al. 2020, of cosines; 0.5 of angles")] = 0.0
    """What the positive's score has to lead by: m of cos - m, or of cos(angle + m)."""
    margin_of: Literal["cosine", "angle"] = "cosine"
    """What the margin is taken from; for unit vectors."""
    hardness: Annotated[float, Range(0, 100, "9 in LLaVE, 5 in EmbeddingGemma")] = 0.0
    """a of the weights exp(a * score) of negatives, which have no gradient (Lan et al. 2025, eq. 5)."""
    hardness_of: Literal["all", "in_batch", "own"] = "all"
    """The negatives that have these weights: all, all but the hard negatives that the query brings, or these alone."""
    mean_weight: bool = False
    """Divide the weights by their mean over the row (Robinson et al. 2021; HaSa, RzenEmbed); not with hardness_of."""
    hardest: Annotated[int, Range(1, 4096, "8 in UniME")] | None = None
    """Only so many negatives of a row, those of the highest scores; None: all."""
    focal: Annotated[float, Range(0, 10, "0.5 in KaLM-Embedding-V2")] = 0.0
    """g of a row's weight (1 - p)^g, p the probability of its positive, without gradient."""
    in_batch: bool = True
    """False: the hard negatives that a query brings are its only ones (the second stage of NV-Embed)."""

    def __post_init__(self) -> None:
        """Raise ValueError for parameters that have no meaning together."""
        if self.mean_weight and (self.hardness_of != "all" or not self.in_batch):
            raise ValueError('mean_weight=true is the mean over all negatives; expected hardness_of="all" and in_batch=true')
        if self.hardest is not None and self.hardness_of != "all":
            raise ValueError(f'hardest={self.hardest} chooses among all negatives; expected hardness_of="all"')

    # What follows from the parameters; a subclass may say others.
    @property
    def merges(self) -> tuple[Merge, ...]:  # type: ignore[override]
        """How the numbers of several tiles become those of all."""
        if not self.in_batch:
            return ()
        if self.hardest is not None:
            return (top_k(self.hardest),)
        return (LOG_SUM_EXP, LOG_SUM_EXP, SUM) if self.mean_weight else (LOG_SUM_EXP,)

    @property
    def is_soft_max(self) -> bool:  # type: ignore[override]
        """Whether the statistic is the log-sum-exp of the logits."""
        return self.in_batch and self.hardest is None and not self.mean_weight

    @property
    def column_hardness(self) -> float:  # type: ignore[override]
        """The hardness that columns are weighted by."""
        return 0.0 if self.hardness_of == "own" else self.hardness

    @property
    def wants_siblings(self) -> bool:  # type: ignore[override]
        """Whether the loss sees the other positives."""
        return self.positives != "own"

    @property
    def sees_columns(self) -> bool:  # type: ignore[override]
        """Whether other queries' passages are negatives."""
        return self.in_batch

    @property
    def wants_own_negatives(self) -> bool:  # type: ignore[override]
        """Whether the loss sees the hard negatives that a row brings one by one."""
        return not self.in_batch or self.hardness_of != "all"

    def statistics(self, tile: Tile) -> Tensor:
        """Return the log-sum of the negatives, (t, 1), and what mean weights need, (t, 3); or the k hardest scores, (t, k)."""
        if not self.in_batch:
            return tile.scores_tP[:, :0]
        if self.hardest is not None:
            highest = tile.scores_tP.topk(min(self.hardest, tile.scores_tP.shape[1]), dim=1).values
            return torch.nn.functional.pad(highest, (0, self.hardest - highest.shape[1]), value=FLOOR)
        sum_t = log_sum_exp(tile.weighted_logits(self.column_hardness))
        if not self.mean_weight:
            return sum_t[:, None]
        with torch.no_grad():
            weight_t = log_sum_exp(torch.where(tile.is_negative, self.hardness * tile.scores_tP, FLOOR))
            count_t = tile.is_negative.sum(1).to(sum_t.dtype)
        return torch.stack([sum_t, weight_t, count_t], dim=1)

    def loss(self, rows: Rows) -> Tensor:
        """Return log(1 + exp(negatives - positive)), (t,), which is 0 for a row without negatives."""
        negatives_t = self.negatives(rows)
        if rows.is_joint:  # each direction's columns hold the positive
            negatives_t = torch.logaddexp(negatives_t, rows.scale * rows.positive_t)
        row_m, score_m = positives_of(rows) if self.wants_siblings else (None, rows.positive_t)
        logit_m = rows.scale * self._with_margin(score_m)
        if row_m is None:
            return self._weighted(self.of_positive(negatives_t, logit_m))
        every_t = log_sum_of_rows(logit_m, row_m, len(negatives_t))
        if self.positives == "sum":
            return self._weighted(self.of_positive(negatives_t, every_t))
        if self.positives == "supcon":
            loss_m = of_rows(torch.logaddexp(negatives_t, every_t), row_m) - logit_m
        else:
            loss_m = self.of_positive(of_rows(negatives_t, row_m), logit_m)
        return mean_of_rows(self._weighted(loss_m), row_m, len(negatives_t))

    def negatives(self, rows: Rows) -> Tensor:
        """Return the logarithm of the weighted sum over each row's negatives, (t,)."""
        if not self.in_batch:
            return self._own(rows)
        if self.hardest is not None:
            score_tk = rows.statistics_tS
            weight_tk = self.hardness * score_tk.detach()
            negatives_t = torch.logsumexp(rows.scale * score_tk + weight_tk, 1)
            if self.mean_weight:
                is_there_tk = score_tk.detach() > FLOOR / 2
                weight_tk = torch.where(is_there_tk, weight_tk, FLOOR)
                negatives_t = negatives_t - _log_mean(torch.logsumexp(weight_tk, 1), is_there_tk.sum(1))
            return negatives_t
        if self.mean_weight:
            return rows.statistics_tS[:, 0] - _log_mean(*rows.statistics_tS[:, 1:].detach().unbind(1))
        negatives_t = rows.statistics_tS[:, 0]
        return torch.logaddexp(negatives_t, self._own(rows)) if self.wants_own_negatives else negatives_t

    def has_negatives(self, rows: Rows, negatives_t: Tensor) -> Tensor:
        """Return which rows have a negative, (t,) bool, by the logarithm of their sum."""
        return negatives_t.detach() > FLOOR / 2 * rows.scale.detach().clamp(max=1)

    def of_positive(self, negatives: Tensor, positive: Tensor) -> Tensor:
        """Return the loss of positives, given the logarithms of their negatives' sums and their own logits, of one shape."""
        return softplus(negatives - positive)

    def _own(self, rows: Rows) -> Tensor:
        """Return the logarithm of the weighted sum over the hard negatives that each row brings, (t,)."""
        cells = rows.cells
        is_negative_c = cells.kind_c == CANDIDATE
        if rows.threshold_t is not None:
            is_negative_c = is_negative_c & (cells.score_c.detach() <= rows.threshold_t[cells.row_c])
        hardness = self.hardness if self.hardness_of != "in_batch" else 0.0
        logit_c = rows.scale * cells.score_c + hardness * cells.score_c.detach()
        return log_sum_of_rows(torch.where(is_negative_c, logit_c, FLOOR), cells.row_c, len(rows.positive_t))

    def _with_margin(self, score_m: Tensor) -> Tensor:
        if self.margin == 0:
            return score_m
        if self.margin_of == "cosine":
            return score_m - self.margin
        # A cosine of 1 has no derivative of its angle; beyond an angle of pi the margin would turn back.
        angle_m = score_m.clamp(-1 + 1e-6, 1 - 1e-6).arccos()
        return (angle_m + self.margin).clamp(max=torch.pi).cos()

    def _weighted(self, loss_m: Tensor) -> Tensor:
        return loss_m if self.focal == 0 else loss_m * (-torch.expm1(-loss_m.detach())) ** self.focal


def softplus(values: Tensor) -> Tensor:
    """Return log(1 + exp(values)), exact also where torch's own takes a shortcut."""
    return torch.logaddexp(values, values.new_zeros(()))


def positives_of(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return (row, score) of the rows' own positives and of the others in the pool, (m,) each; entries of row t are none."""
    is_sibling_c = rows.cells.kind_c == SIBLING
    own = torch.arange(len(rows.positive_t), device=rows.positive_t.device)
    # Candidates may stand between: a selection would wait for the device, so they go to a row behind the last one.
    row_c = torch.where(is_sibling_c, rows.cells.row_c, len(own))
    return torch.cat([own, row_c]), torch.cat([rows.positive_t, rows.cells.score_c])


def of_rows(values_t: Tensor, row_m: Tensor) -> Tensor:
    """Return the value of each entry's row, (m,), 0 for entries of no row."""
    return torch.nn.functional.pad(values_t, (0, 1))[row_m]


def log_sum_of_rows(logit_m: Tensor, row_m: Tensor, num_rows: int) -> Tensor:
    """Return the log of the sum over each row's entries, (t,), FLOOR where there are none; rows from `num_rows` on are cut."""
    most_t = logit_m.new_full((num_rows + 1,), FLOOR).scatter_reduce(0, row_m, logit_m.detach(), "amax")
    sum_t = logit_m.new_zeros(num_rows + 1).index_add(0, row_m, (logit_m - most_t[row_m]).exp())
    is_empty_t = sum_t.detach() == 0
    return torch.where(is_empty_t, FLOOR, most_t + torch.where(is_empty_t, 1, sum_t).log())[:num_rows]


def mean_of_rows(value_m: Tensor, row_m: Tensor, num_rows: int) -> Tensor:
    """Return the mean over each row's entries, (t,); rows from `num_rows` on are left out."""
    sums = value_m.new_zeros(2, num_rows + 1).index_add(1, row_m, torch.stack([value_m, torch.ones_like(value_m)]))
    return sums[0, :num_rows] / sums[1, :num_rows]


def _log_mean(log_sum_t: Tensor, count_t: Tensor) -> Tensor:
    return log_sum_t - count_t.clamp(min=1).log()
