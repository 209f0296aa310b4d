"""The ready-made proof passes what is right, and says in one sentence what is wrong with anything else."""

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from gradcache import OBJECTIVES, Objective, find_objective
from gradcache.objectives import (
    CACR,
    AdaptiveMargins,
    AlignmentUniformity,
    InfoNCE,
    Progressive,
    Sigmoid,
)
from gradcache.objectives.tile import CANDIDATE, FLOOR, LOG_SUM_EXP, MAXIMUM, SUM, Merge, log_sum_exp, weighted_mean
from gradcache.testing import prove
from gradcache.testing.threads import run_threads

# Parameters that change an objective's statistics or the cells it sees.
VARIANTS = [
    ("info_nce", {"positives": "mean"}),
    ("info_nce", {"positives": "sum", "margin": 0.1}),
    ("info_nce", {"positives": "supcon", "hardness": 3}),
    ("info_nce", {"hardness": 2, "mean_weight": True}),
    ("info_nce", {"hardness": 2, "hardness_of": "in_batch"}),
    ("info_nce", {"hardness": 2, "hardness_of": "own", "focal": 0.5}),
    ("info_nce", {"hardest": 3, "hardness": 2, "mean_weight": True, "positives": "mean"}),
    ("info_nce", {"in_batch": False}),
    ("info_nce", {"margin": 0.2, "margin_of": "angle"}),
    ("dcl", {"positives": "mean", "hardest": 2}),
    ("debiased", {"hardness": 2, "mean_weight": True}),
    ("groco", {"hardest": 3}),
    ("correlation", {"of": "ranks"}),
]
STOPS = {"dclw", "progressive"}  # they have weights without a gradient


@pytest.mark.parametrize(("name", "parameters"), [*((name, {}) for name in OBJECTIVES), *VARIANTS])
def test_every_objective_of_the_package_is_proven(name, parameters):
    stops = name in STOPS or parameters.keys() & {"hardness", "focal"}
    prove(find_objective(name, parameters), stops_gradient=bool(stops))


class LearnedMargin(nn.Module, Objective):
    """A sum of hinges, with a margin for each kind of columns."""

    merges = (SUM,)
    returns_positive = True

    def __init__(self):
        super().__init__()
        self.margins = nn.Parameter(torch.tensor([0.3, 0.6, 0.4]))

    def statistics(self, tile):
        return tile.sum(relu(tile.scores_tP - tile.positive_t[:, None] + self.margins[tile.kind_P.long()]))[:, None]

    def loss(self, rows):
        return rows.statistics_tS[:, 0] * rows.scale


class LogitsAndScores(Objective):
    """A soft-max of logits beside a sum of scores."""

    merges = (LOG_SUM_EXP, SUM)

    def statistics(self, tile):
        return torch.stack([log_sum_exp(tile.logits), tile.sum(tile.scores_tP.square())], 1)

    def loss(self, rows):
        return relu(rows.statistics_tS[:, 0] - rows.scale * rows.positive_t) + rows.statistics_tS[:, 1]


class Distilled(Objective):
    """Squares of differences to a teacher's scores of the candidates; no columns count."""

    merges = ()
    cell_values = ("teacher",)

    def statistics(self, tile):
        return tile.scores_tP[:, :0]

    def loss(self, rows):
        difference_c = rows.scale * rows.cells.score_c - rows.cells.values["teacher"]
        return rows.sum_cells(torch.where(rows.cells.kind_c == CANDIDATE, difference_c, 0).square())


class Guided(Objective):
    """The mean score of negatives weighted by a second matrix, under one maximum."""

    merges = (weighted_mean(1),)
    second = "guide"

    def statistics(self, tile):
        log_weight_tP = torch.where(tile.is_negative, tile.second_tP, FLOOR)
        mean_t = tile.row_values["weight"] * tile.sum(log_weight_tP.softmax(1) * tile.scores_tP)
        return torch.stack([log_weight_tP.logsumexp(1), mean_t], 1)

    def loss(self, rows):
        return rows.scale * (rows.statistics_tS[:, 1] - rows.positive_t) * (1 + rows.progress)


class WholeBatch(Objective):
    """InfoNCE over the log-sum-exp of all rows and negatives."""

    merges = (LOG_SUM_EXP,)
    batch_merges = (LOG_SUM_EXP, SUM)

    def statistics(self, tile):
        return log_sum_exp(tile.logits)[:, None]

    def batch_statistics(self, rows):
        return torch.stack([rows.statistics_tS[:, 0], rows.positive_t * rows.values["margin"]], 1)

    def loss(self, rows):
        return (rows.batch[0] - rows.scale * rows.positive_t).exp().log1p() + rows.batch[1].square()


FAMILIES = [LearnedMargin(), LogitsAndScores(), Distilled(), Guided(), InfoNCE(hardest=3), CACR(), Sigmoid(bias=-1.0)]
FAMILIES += [AdaptiveMargins(), AlignmentUniformity()]


@pytest.mark.parametrize("objective", FAMILIES, ids=lambda objective: type(objective).__name__)
def test_objectives_of_all_families_are_proven(objective):
    prove(objective)


def test_an_objective_of_the_whole_batch_is_proven_with_values_of_its_queries():
    prove(WholeBatch(), query_values=["margin"])


def test_what_is_detached_on_purpose_has_to_be_said():
    with pytest.raises(AssertionError, match="gradient of the embeddings is not the derivative of the loss"):
        prove(Progressive())
    prove(Progressive(), stops_gradient=True)


class NoMerge(InfoNCE):
    is_soft_max = False

    def statistics(self, tile):
        return torch.cat([super().statistics(tile), tile.scores_tP.amax(1, keepdim=True)], 1)


class SumOfLogarithms(InfoNCE):
    merges = (SUM,)


class SumOfMaxima(Objective):
    merges = (LOG_SUM_EXP, SUM)

    def statistics(self, tile):
        return torch.stack([log_sum_exp(tile.logits), tile.scores_tP.amax(1).clamp(min=-2)], 1)

    def loss(self, rows):
        return relu(rows.statistics_tS[:, 1] - rows.positive_t + 2) + rows.statistics_tS[:, 0].clamp(min=-9)


class MeanOfTile(SumOfMaxima):
    merges = (SUM,)

    def statistics(self, tile):
        return (tile.sum(tile.scores_tP) / tile.is_negative.sum(1).clamp(min=1))[:, None]

    def loss(self, rows):
        return rows.statistics_tS[:, 0] - rows.positive_t


class UsesMasked(MeanOfTile):
    def statistics(self, tile):
        return tile.scores_tP.sum(1, keepdim=True)


class CountsMasked(MeanOfTile):
    def statistics(self, tile):
        return (tile.sum(tile.scores_tP) + tile.scores_tP.shape[1])[:, None]


class MixesRows(MeanOfTile):
    def statistics(self, tile):
        return tile.sum(tile.scores_tP - tile.scores_tP.clamp(min=-2).mean(0))[:, None]


class InfiniteAlone(MeanOfTile):
    def statistics(self, tile):
        return tile.sum(tile.scores_tP.exp())[:, None]

    def loss(self, rows):
        return rows.statistics_tS[:, 0].log() - rows.positive_t


class ForgetsThePositive(LearnedMargin):
    returns_positive = False


class NoSoftMax(MeanOfTile):
    is_soft_max = True


class MeanOfTheBatch(WholeBatch):
    batch_merges = (LOG_SUM_EXP, Merge(lambda parts: parts.mean(0), identity=0.0))


class NoIdentity(WholeBatch):
    batch_merges = (LOG_SUM_EXP, Merge(lambda parts: parts.sum(0)))


class WrongBackward(InfoNCE):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    is_soft_max = False

    def statistics(self, tile):
        return self.Doubled.apply(super().statistics(tile))


class OtherWithoutGradient(InfoNCE):
    """Its statistics are others where they are made alone, before the gradient."""

    is_soft_max = False

    def statistics(self, tile):
        return super().statistics(tile) * (1 if torch.is_grad_enabled() else 1.1)


class WideTilesOnly(InfoNCE):
    def statistics(self, tile):
        return tile.scores_tP.topk(self.hardest, dim=1).values


class OneLoss(InfoNCE):
    def loss(self, rows):
        return super().loss(rows).mean()


class NeedsRows(InfoNCE):
    def loss(self, rows):
        return super().loss(rows) + 0 * rows.positive_t.max()


class SmallestAsMaximum(MeanOfTile):
    merges = (MAXIMUM,)

    def statistics(self, tile):
        return torch.where(tile.is_negative, tile.scores_tP, 2).amin(1, keepdim=True)


@pytest.mark.parametrize(
    "objective, sentence",
    [
        (NoMerge(), r"statistics returns \(5, 2\) for 5 rows, and its merges take \(5, 1\); each statistic needs a merge"),
        (SumOfLogarithms(), "the loss differs by .* cut into tiles; number 0 of `merges`"),
        (SumOfMaxima(), "cut into tiles; number 1 of `merges`"),
        (SmallestAsMaximum(), "cut into tiles; number 0 of `merges`"),
        (MeanOfTile(), "cut into tiles; .* or `statistics` counts the columns of its tile"),
        (UsesMasked(), "with another score in masked cells; masked cells are used"),
        (CountsMasked(), "where masked columns are added; masked cells are used"),
        (MixesRows(), "where the rows are cut into tiles; `statistics` mixes its rows"),
        (InfiniteAlone(), "the loss is not finite where a row has no negatives"),
        (ForgetsThePositive(), "gradient of the embeddings is not the derivative .* returns_positive=True is missing"),
        (NoSoftMax(), "has is_soft_max=True, and its statistics are not"),
        (MeanOfTheBatch(), "where the rows are cut into ranks"),
        (NoIdentity(), "where the rows are cut into ranks, .* its identity is not that of no rows"),
        (WrongBackward(), "gradient of the embeddings is not the derivative of the loss"),
        (OtherWithoutGradient(), r"differs by .* from the oracle's in a step on 1 ranks of \[5\] queries, gather='queries'"),
        (WideTilesOnly(hardest=3), "statistics fails for a tile of 1 columns"),
        (OneLoss(), r"loss returns \(\) for 5 rows"),
        (NeedsRows(), r"NeedsRows fails with \w+ in a step on 2 ranks of \[0, 4\] queries"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Objective) else "",
)
def test_a_broken_objective_is_named_with_its_fault(objective, sentence):
    with pytest.raises(AssertionError, match=sentence) as caught:
        prove(objective, query_values=["margin"])
    assert type(objective).__name__ in str(caught.value) and "\n" not in str(caught.value)


def test_threads_are_ranks_of_a_group_and_the_first_failure_is_raised():
    def rank_fails(group):
        if group.rank() == 1:
            raise KeyError("the reason")
        group.allreduce([torch.ones(1)])

    with pytest.raises(KeyError, match="the reason"):
        run_threads(rank_fails, 3)
