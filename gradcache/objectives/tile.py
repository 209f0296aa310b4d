"""What an objective is, and what it sees: rows of raw scores against some columns, then merged numbers of each row.

An objective is three small parts. `statistics` turns a tile into S numbers a row. `merges` say how the numbers of several tiles,
which may stand on several ranks, become those of all columns. `loss` turns a row's merged numbers and its picked cells into its
loss, and so costs nothing that grows with the pool. The gradient follows from these by autograd, tile by tile.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

# t rows of a tile, P of its columns, S statistics of a row, W tiles that are merged, c cells

FLOOR = -1e6  # raw score of a masked cell: finite, so that no use of it makes NaN, and nothing beside any true score
OTHER_SIDE, SAME_SIDE, EXTRA = 0, 1, 2  # kinds of columns: texts of the other side, of the rows' own side, without a gradient
SIBLING, CANDIDATE = 0, 1  # kinds of cells: another positive of the row; a text of its own that the batch names


@dataclass(frozen=True, kw_only=True)
class Tile:
    """t rows of the score matrix, P columns. Masked cells hold FLOOR: all positives of a row, and copies of texts."""

    scores_tP: Tensor  # raw, without the temperature; a leaf
    scale: Tensor  # scalar, the inverse temperature; a leaf
    positive_t: Tensor  # raw score of the row's own positive; has a gradient if the objective says `returns_positive`
    kind_P: Tensor  # int8, OTHER_SIDE, SAME_SIDE or EXTRA
    row_values: Mapping[str, Tensor] = field(default_factory=dict)  # (t,) each, what travels with the rows
    second_tP: Tensor | None = None  # the second matrix that the objective asks for, without gradient
    progress: float = 0.0  # of the training, 0 to 1
    make_logits: Callable[[], Tensor] | None = None  # of the loss; None: scores times scale

    @property
    def logits(self) -> Tensor:
        """Scores times the inverse temperature, (t, P). An objective that uses them and not the scores costs one pass less."""
        return self.scores_tP * self.scale if self.make_logits is None else self.make_logits()

    def weighted_logits(self, hardness: float) -> Tensor:
        """Logits of negatives that weigh exp(hardness * raw score), (t, P); the weights have no gradient."""
        return self.logits if hardness == 0 else self.logits + hardness * self.scores_tP.detach()

    @property
    def is_negative(self) -> Tensor:
        """Which cells are negatives, (t, P) bool."""
        return self.scores_tP.detach() > FLOOR / 2

    def sum(self, values_tP: Tensor) -> Tensor:
        """Return the sum of values over each row's negatives, (t,)."""
        return torch.where(self.is_negative, values_tP, 0).sum(1)


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Pairs of a row and a text whose scores the loss sees one by one, sorted by row."""

    row_c: Tensor  # int64
    kind_c: Tensor  # int8, SIBLING or CANDIDATE
    score_c: Tensor  # raw; a leaf
    values: Mapping[str, Tensor] = field(default_factory=dict)  # (c,) each, such as a teacher's scores


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is known of t rows once all their columns were seen."""

    statistics_tS: Tensor  # merged; a leaf
    scale: Tensor  # scalar, the inverse temperature; a leaf
    positive_t: Tensor  # raw score of the row's own positive; a leaf
    cells: Cells
    threshold_t: Tensor | None = None  # raw score above which a text is no negative of the row
    values: Mapping[str, Tensor] = field(default_factory=dict)  # (t,) each, what travels with the rows
    batch: Tensor | None = None  # merged `batch_statistics` of the rows of all ranks; of `gathered_width` the rows themselves
    is_joint: bool = False  # the columns are those of both directions, of which each has the row's own positive, too
    progress: float = 0.0

    def sum_cells(self, values_c: Tensor) -> Tensor:
        """Return the sum over each row's cells, (t,)."""
        return values_c.new_zeros(len(self.positive_t)).index_add(0, self.cells.row_c, values_c)


@dataclass(frozen=True)
class Merge:
    """How some neighbouring statistics of several tiles become those of all: `merge` takes (W, t, width) to (t, width)."""

    merge: Callable[[Tensor], Tensor]
    width: int = 1
    identity: float = FLOOR  # the statistic of no columns; of `batch_merges` that of no rows


def _sum(parts_WtS: Tensor) -> Tensor:
    return parts_WtS.sum(0)


def _largest(parts_WtS: Tensor) -> Tensor:
    return parts_WtS.amax(0)


def _log_sum_exp(parts_WtS: Tensor) -> Tensor:
    # The gradient's weights are quotients of sums, and so add up to 1 to a rounding. Those of torch's own are off together by the
    # rounding of the result, which the gradient of a temperature, a difference of large numbers, shows tenfold.
    most_tS = parts_WtS.detach().amax(0)
    return most_tS + (parts_WtS - most_tS).exp().sum(0).log()


def _weighted_mean(parts_WtS: Tensor) -> Tensor:
    log_weight_Wt1, means = parts_WtS[..., :1], parts_WtS[..., 1:]
    share_Wt1 = torch.softmax(log_weight_Wt1, 0)
    return torch.cat([_log_sum_exp(log_weight_Wt1), (share_Wt1 * means).sum(0)], 1)


SUM = Merge(_sum, identity=0.0)
MAXIMUM = Merge(_largest)
LOG_SUM_EXP = Merge(_log_sum_exp)


def weighted_mean(num_means: int = 1) -> Merge:
    """Return the merge of a logarithm of a sum of weights, and of means under these weights behind it."""
    return Merge(_weighted_mean, 1 + num_means)


def top_k(k: int) -> Merge:
    """Return the merge of the k largest numbers of each tile, FLOOR where it has fewer."""
    return Merge(lambda parts_WtS: parts_WtS.transpose(0, 1).flatten(1).topk(k, dim=1).values, k)


def merge_all(parts_WtS: Tensor, merges: Sequence[Merge]) -> Tensor:
    """Return the statistics of all columns from those of several tiles, (t, S)."""
    widths = [merge.width for merge in merges]
    pieces = parts_WtS.split(widths, dim=2)
    merged = [merge.merge(piece) for merge, piece in zip(merges, pieces, strict=True)]
    return torch.cat(merged, dim=1) if merged else parts_WtS[0]  # an objective of cells alone has none


class Objective:
    """A loss of rows of scores. A subclass says `merges`, `statistics` and `loss`; all else has a default.

    An objective with parameters of its own is an `nn.Module`, too; their gradients are summed over the ranks with the loss.
    """

    merges: Sequence[Merge] = ()
    batch_merges: Sequence[Merge] = ()  # of numbers that the loss of every row depends on, merged over the rows of all ranks
    gathered_width: int = 0  # instead of merges: `batch_statistics` of so many numbers a row, and the loss sees those of all rows
    wants_siblings: bool = False  # whether the loss needs the scores of a row's other positives
    wants_own_negatives: bool = False  # whether the hard negatives that a row brings are its cells, and no columns of it
    needs_same_side: ClassVar[bool] = False  # whether the columns of the row's own side are what it is about
    sees_columns: bool = True  # False: the loss is about rows and their own positives, and no column is looked at
    cell_values: Sequence[str] = ()  # values that every cell must have
    row_values: Sequence[str] = ()  # values that every row must have, such as the grade of it and its positive
    second: Literal["positive"] | str | None = None  # a second matrix: of the rows' positives, or of an output's name
    returns_positive: ClassVar[bool] = False  # whether `statistics` gives a gradient to `tile.positive_t`
    is_soft_max: bool = False  # whether `statistics` is nothing but `log_sum_exp(tile.weighted_logits(self.column_hardness))`
    column_hardness: float = 0.0  # of the soft-max kind: a negative weighs exp(hardness * raw score), which has no gradient
    joins: ClassVar[bool] = False  # whether `loss` takes both directions in one denominator, see `Rows.is_joint`
    has_pair_scores: ClassVar[bool] = False  # whether `pair_scores` is not the product of a row and its own positive

    def __init_subclass__(cls) -> None:
        """Take a subclass with statistics of its own for one of the soft-max kind only if it says so itself."""
        if "statistics" in vars(cls) and "is_soft_max" not in vars(cls):
            cls.is_soft_max = False

    def statistics(self, tile: Tile) -> Tensor:
        """Return what the tile's columns add to each row, (t, S)."""
        raise NotImplementedError

    def batch_statistics(self, rows: Rows) -> Tensor:
        """Return what each row adds to the numbers of the whole batch, (t, S2)."""
        raise NotImplementedError

    def pair_scores(self, row_Bw: Tensor, positive_Bw: Tensor) -> Tensor:
        """Return the raw score of each row with its own positive, (B,), with a graph."""
        return (row_Bw * positive_Bw).sum(1)

    @property
    def has_batch_numbers(self) -> bool:
        """Whether the loss of a row depends on those of all."""
        return bool(self.batch_merges) or self.gathered_width > 0

    def loss(self, rows: Rows) -> Tensor:
        """Return the loss of each row, (t,)."""
        raise NotImplementedError


def trained_parameters(objective: Objective) -> list[nn.Parameter]:
    """Return the parameters of an objective that has some."""
    parameters: Iterable[nn.Parameter] = objective.parameters() if isinstance(objective, nn.Module) else ()
    return [parameter for parameter in parameters if parameter.requires_grad]


def log_sum_exp(values_tP: Tensor) -> Tensor:
    """Return `values_tP.logsumexp(1)`, (t,); two passes forward, one backward. Does not wait for the device.

    The soft-max that is its gradient comes first, in torch's fused kernel, and holds the sum in its largest entry. Plain
    torch computes the exponentials twice and passes over the tile six times. A compiler fuses these, and does better.
    """
    return torch.logsumexp(values_tP, 1) if torch.compiler.is_compiling() else _LogSumExp.apply(values_tP)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values_tP: Tensor) -> Tensor:
        most_t = values_tP.amax(1)
        softmax_tP = torch.softmax(values_tP, 1)
        ctx.save_for_backward(softmax_tP)
        # The largest entry is at least 1 / columns, so its logarithm is exact to a rounding.
        return most_t - softmax_tP.amax(1).log()

    @staticmethod
    def backward(ctx, gradient_t: Tensor) -> Tensor:
        (softmax_tP,) = ctx.saved_tensors
        return softmax_tP.mul_(gradient_t[:, None])  # nobody reads it a second time
