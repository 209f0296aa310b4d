"""One small objective for each thing that the interface can express beyond InfoNCE: a pattern to begin from.

A number of the whole batch (`AlignmentUniformity`), a selection (`HardestNegatives`), a weighted mean (`AttractionRepulsion`), a
second matrix and a positive that returns its gradient (`AdaptiveMargins`), parameters (`Sigmoid`), the training's progress
(`Progressive`), columns derived from several texts (`symile_rows`).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from gradcache.objectives.info_nce import InfoNCE, softplus
from gradcache.objectives.tile import (
    FLOOR,
    LOG_SUM_EXP,
    SAME_SIDE,
    SIBLING,
    SUM,
    Objective,
    Rows,
    Tile,
    log_sum_exp,
    top_k,
    weighted_mean,
)


class AlignmentUniformity(Objective):
    """Squared distance of a row to its positive, and the log of the mean Gaussian potential among the rows of its side.

    For unit vectors, with `same_side`. Source: Wang and Isola 2020, arXiv 2005.10242.
    """

    merges = (LOG_SUM_EXP, SUM)
    batch_merges = (LOG_SUM_EXP, SUM)

    def __init__(self, sharpness: float = 2.0, weight: float = 1.0):
        """sharpness: t of the potential exp(-t d^2). weight: of the uniformity."""
        self.sharpness, self.weight = sharpness, weight

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


class HardestNegatives(Objective):
    """InfoNCE among the positive and the k highest-scoring negatives of all ranks."""

    def __init__(self, k: int = 8):
        """k: negatives of a row."""
        self.k, self.merges = k, (top_k(k),)

    def statistics(self, tile: Tile) -> Tensor:
        """Return the k highest scores, FLOOR where there are fewer, (t, k)."""
        highest = tile.scores_tP.topk(min(self.k, tile.scores_tP.shape[1]), dim=1).values
        return nn.functional.pad(highest, (0, self.k - highest.shape[1]), value=FLOOR)

    def loss(self, rows: Rows) -> Tensor:
        """Return the cross entropy of each row, (t,)."""
        return softplus(torch.logsumexp(rows.scale * rows.statistics_tS, 1) - rows.scale * rows.positive_t)


class AttractionRepulsion(Objective):
    """CACR: positives weigh more the farther they are, negatives the nearer they are, each within their group.

    For unit vectors. Source: Zheng et al. 2021, arXiv 2105.03746.
    """

    merges = (weighted_mean(1),)
    wants_siblings = True

    def __init__(self, attraction: float = 1.0, repulsion: float = 2.0):
        """attraction, repulsion: t+ and t-, which sharpen the weights."""
        self.attraction, self.repulsion = attraction, repulsion

    def statistics(self, tile: Tile) -> Tensor:
        """Return the log of the sum of the negatives' weights, and their mean squared distance, (t, 2)."""
        is_negative = tile.is_negative
        distance_tP = torch.where(is_negative, 2 - 2 * tile.scores_tP, 0)
        log_weight_tP = torch.where(is_negative, -self.repulsion * distance_tP, FLOOR)
        mean_t = (torch.softmax(log_weight_tP, 1) * distance_tP).sum(1)
        return torch.stack([torch.logsumexp(log_weight_tP, 1), mean_t], dim=1)

    def loss(self, rows: Rows) -> Tensor:
        """Return the weighted distance of the positives less that of the negatives, (t,)."""
        num_rows, cells = len(rows.positive_t), rows.cells
        is_sibling = cells.kind_c == SIBLING
        row = torch.cat([torch.arange(num_rows, device=rows.positive_t.device), cells.row_c])
        distance = 2 - 2 * torch.cat([rows.positive_t, cells.score_c])
        counts = torch.cat([torch.ones_like(rows.positive_t), is_sibling.to(distance.dtype)])
        weight = (self.attraction * distance).exp() * counts  # distances are at most 4
        sums = distance.new_zeros(2, num_rows).index_add(1, row, torch.stack([weight * distance, weight]))
        return sums[0] / sums[1] - rows.statistics_tS[:, 1]


class AdaptiveMargins(Objective):
    """The lead of the positive over a negative is to be their own distance: no teacher, and a margin for each pair.

    Source: Gienapp et al. 2024, arXiv 2407.21515.
    """

    merges = (SUM, SUM)
    second = "positive"
    returns_positive = True

    def statistics(self, tile: Tile) -> Tensor:
        """Return the sum of squared errors of the leads, and the number of negatives, (t, 2)."""
        assert tile.second_tP is not None, "this objective asks for the positives' matrix"
        error_tP = tile.positive_t[:, None] - tile.scores_tP - (1 - tile.second_tP)
        return torch.stack([tile.sum(error_tP.square()), tile.sum(torch.ones_like(error_tP))], dim=1)

    def loss(self, rows: Rows) -> Tensor:
        """Return the mean squared error of each row, (t,)."""
        return rows.statistics_tS[:, 0] / rows.statistics_tS[:, 1].clamp(min=1)


class Sigmoid(nn.Module, Objective):
    """Each pair is a yes-or-no question of its own, with a learnt bias.

    Source: Zhai et al. 2023 (SigLIP), arXiv 2303.15343.
    """

    merges = (SUM,)

    def __init__(self, bias: float = -10.0):
        """bias: of all logits at the start."""
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def statistics(self, tile: Tile) -> Tensor:
        """Return the sum over the negatives, (t, 1)."""
        return -tile.sum(logsigmoid(-tile.logits - self.bias))[:, None]

    def loss(self, rows: Rows) -> Tensor:
        """Return the sum over the row's pairs, (t,)."""
        return rows.statistics_tS[:, 0] - logsigmoid(rows.scale * rows.positive_t + self.bias)


class Progressive(InfoNCE):
    """InfoNCE that begins with the easy rows and ends with the hard ones, by the training's progress.

    The idea is that of Wu et al. 2023 (PEG), arXiv 2311.11691; the weights are the simplest that have it.
    """

    def loss(self, rows: Rows) -> Tensor:
        """Return each row's loss under its weight, (t,)."""
        loss_t = super().loss(rows)
        difficulty_t = 1 - torch.exp(-loss_t.detach())  # 1 - the probability of the positive
        return 2 * loss_t * ((1 - rows.progress) * (1 - difficulty_t) + rows.progress * difficulty_t)


def symile_rows(embedding_nD: Tensor) -> Tensor:
    """Return queries and passages of triples for the multilinear product of three texts, (3 n / 3, 3 D).

    embedding_nD: n / 3 rows each of three towers, x then y then z. Queries hold x, y and z side by side, the first passages the
    products of the two others, which only their own query may see (`Batch.own_only`), and further passages the same of texts that
    were drawn apart: the negatives. With `outputs` x, y and z of width D each, all three are an anchor once.
    Source: Saporta et al. 2024 (Symile), arXiv 2411.01053.
    """
    x, y, z = embedding_nD.tensor_split(3)
    apart_y, apart_z = y.roll(1, 0), z.roll(2, 0)
    queries = torch.cat([x, y, z], dim=1)
    together = torch.cat([y * z, x * z, x * y], dim=1)
    drawn_apart = torch.cat([apart_y * apart_z, x * apart_z, x * apart_y], dim=1)
    return torch.cat([queries, together, drawn_apart])
