"""One direction of the loss in one view of the embeddings: rows against columns, either of which may stand on other ranks.

Where a rank holds all columns of its rows, statistics and gradient come in one sweep. Where columns are spread over the ranks,
or the loss of a row depends on all others, they are two phases, and the ranks exchange a few numbers a row between them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradcache.cells import add_pair_gradients, pair_gradients, pair_scores
from gradcache.masks import Masks
from gradcache.matrix import Matrix, TileGradients
from gradcache.objectives.tile import CANDIDATE, OTHER_SIDE, SIBLING, Objective
from gradcache.options import FalseNegatives
from gradcache.passes import Kept
from gradcache.rows import RowLoss, picked
from gradcache.tiles import Tiles
from gradcache.widths import View, ViewedRows, view_rows

# R rows of a term, B rows of this rank, P columns, D width, S statistics, c cells


class Source:
    """Rows from which terms take theirs, and what the terms give back to their gradient."""

    def __init__(self, rows_ND: Tensor, is_trained: bool = True):
        self.rows_ND, self.is_trained = rows_ND, is_trained
        self._gradient_ND: Tensor | None = None

    def gradient(self) -> Tensor:
        """Return the gradient so far, at least float32."""
        if self._gradient_ND is None:
            wide = torch.promote_types(self.rows_ND.dtype, torch.float32)
            self._gradient_ND = torch.zeros(self.rows_ND.shape, dtype=wide, device=self.rows_ND.device)
        return self._gradient_ND

    def add(self, gradient_Nw: Tensor, view: View) -> None:
        """Add the gradient of a view's components; the source may keep the memory."""
        if self._gradient_ND is None and gradient_Nw.shape == self.rows_ND.shape:
            self._gradient_ND = gradient_Nw
        else:
            self.gradient()[:, view.first : view.stop] += gradient_Nw


@dataclass(frozen=True, kw_only=True)
class Siblings:
    """Other positives of the rows, each text once."""

    row: Tensor  # (s,) of those among this rank's columns: a row of the term, …
    column: Tensor  # … and a column
    sent: Sequence[int]  # how many of them belong to the rows of each rank, in this order
    own_row: Tensor  # of those of this rank's rows, on whichever rank the column is: one of the B rows
    received: Sequence[int]  # how many of them come from each rank, in this order
    num_of_own: Tensor  # (B,) on the host: how many each of this rank's rows has
    values: Mapping[str, Tensor]  # of the same


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Pairs of one of this rank's rows and one of its passages, of which the loss wants the scores."""

    row: Tensor
    passage: Tensor
    num_of_rows: Tensor  # (B,) on the host: how many each row has
    source: Source  # of the passages
    values: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Direction:
    """What is contrasted with what, whatever the view."""

    rows: Source  # R: this rank's, or where columns are spread those of all ranks
    columns: Sequence[Source]  # trained ones first
    kinds: Sequence[int]  # of each of them
    masks: Masks
    second: tuple[Source, Sequence[Source], View | None] | None  # rows and columns of the second matrix; None: in the term's view
    own_rows: Source  # B, of this rank
    own_positives: Source  # B, the positive of each
    siblings: Siblings
    chosen: Chosen | None
    is_spread: bool
    weight: float  # factor of the sum of its losses
    values: Mapping[str, Tensor]  # (B,) of this rank's rows
    row_values: Mapping[str, Tensor]  # (R,)


@dataclass(eq=False)
class Term:
    """A direction in a view; a term equals itself alone."""

    direction: Direction
    view: View
    objective: Objective
    scale: Tensor  # scalar
    positive_R: Tensor  # raw score of each row's own positive
    own_positive_B: Tensor  # the same of this rank's rows
    progress: float
    tile_rows: int | None
    false_negatives: FalseNegatives | None = None
    joined: "Term | None" = None  # the other direction, whose columns are further ones of the same rows
    is_joined: bool = False  # to another term, which has the loss of both
    loss: RowLoss = field(init=False)

    def __post_init__(self) -> None:
        self._scale_gradient = torch.zeros((), dtype=torch.float64, device=self.scale.device)
        self.num_dropped = torch.zeros((), dtype=torch.int64, device=self.scale.device)
        self._parameters: list[Tensor] = []
        self._kept = Kept()

    @property
    def weight(self) -> float:
        """Factor of the sum of its losses."""
        return self.direction.weight * self.view.share

    @property
    def is_one_sweep(self) -> bool:
        """Whether statistics and gradient come together."""
        return not (self.direction.is_spread or self.objective.has_batch_numbers or self.joined or self.is_joined)

    def sweep(self) -> None:
        """Evaluate the loss and its gradients, but for `finish`."""
        self._open()
        self.begin_loss(self.sibling_scores())
        found = self._tiles.gradients(self.loss.derivative)
        self.num_dropped = self._tiles.num_dropped
        self._give_back(found, self.sibling_derivatives())

    def statistics(self, keep_bytes: int) -> tuple[Tensor, Tensor, int]:
        """Return the statistics of this rank's columns, (R, S), the siblings' scores, and the bytes of scores that were kept.

        The view is closed until `gradients`: several terms hold one copy of cut rows at a time.
        """
        self._open()
        statistics_RS, kept_bytes = self._tiles.statistics(keep_bytes)
        sibling_scores = self.sibling_scores()
        self.num_dropped = self._tiles.num_dropped
        self._close()
        return statistics_RS, sibling_scores, kept_bytes

    def gradients(self, derivative_RS: Tensor, sibling_gradient: Tensor) -> None:
        """Add the gradients, given the derivative to the statistics and to the scores of this rank's columns' siblings."""
        self._open()
        self._give_back(self._tiles.gradients(lambda rows, _: derivative_RS[rows]), sibling_gradient)

    def sibling_scores(self) -> Tensor:
        """Return the raw scores of the siblings among this rank's columns; after the term was opened."""
        siblings = self.direction.siblings
        return pair_scores(self._rows.rows_nw, siblings.row, self._columns.rows_nw, siblings.column)

    def begin_loss(self, sibling_scores: Tensor) -> None:
        """Take the scores of the siblings of this rank's rows, in the order in which they are received."""
        direction, chosen = self.direction, self.direction.chosen
        num_of_rows = direction.siblings.num_of_own
        parts = [(SIBLING, direction.siblings.own_row, sibling_scores, direction.siblings.values)]
        if chosen is not None:
            rows, passages = (view_rows([s.rows_ND], self.view).rows_nw for s in (direction.own_rows, chosen.source))
            parts.append((CANDIDATE, chosen.row, pair_scores(rows, chosen.row, passages, chosen.passage), chosen.values))
            num_of_rows = num_of_rows + chosen.num_of_rows
        names = {*self.objective.cell_values, *(name for *_, known in parts for name in known)}
        cells = picked(parts, num_of_rows, sorted(names))
        self.loss = RowLoss(
            objective=self.objective,
            scale=self.scale,
            positive_B=self.own_positive_B,
            cells=cells,
            values=direction.values,
            progress=self.progress,
            is_joint=self.joined is not None,
            threshold_B=self._thresholds(self.own_positive_B),
        )

    def sibling_derivatives(self) -> Tensor:
        """Return what the loss gives the scores of this rank's rows' siblings, in the order in which they were received."""
        return self.loss.cells.by_part(self.loss.cell_gradient_c)[0]

    def finish(self, of_positive_B: Tensor | None = None) -> None:
        """Carry the gradients of the rows' own positives and of the candidates back, once all tiles are done.

        of_positive_B: what the tiles of all ranks give to the scores of this rank's rows' positives.
        """
        direction, chosen = self.direction, self.direction.chosen
        gradient_B = self.loss.positive_gradient_B
        if of_positive_B is not None:
            gradient_B = gradient_B + of_positive_B.to(gradient_B.dtype)
        self._give_back_own(gradient_B)
        if chosen is not None:
            gradient_c = self.loss.cells.by_part(self.loss.cell_gradient_c)[1]
            self._give_back_pairs(direction.own_rows, chosen.row, chosen.source, chosen.passage, gradient_c)

    def totals(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return this rank's part of the weighted loss, of the scale's gradient, and of those of the objective's parameters."""
        of_parameters = [a + b for a, b in zip(self.loss.parameters, self._parameters, strict=True)]
        scale = self.loss.scale_gradient + self._scale_gradient
        return self.loss.loss_sum * self.weight, scale * self.weight, [value * self.weight for value in of_parameters]

    def _thresholds(self, positive_R: Tensor) -> Tensor | None:
        return None if self.false_negatives is None else self.false_negatives.thresholds(positive_R)

    def _open(self) -> None:
        direction = self.direction
        self._rows: ViewedRows = view_rows([direction.rows.rows_ND], self.view)
        self._columns: ViewedRows = view_rows([source.rows_ND for source in direction.columns], self.view)
        second = None
        if direction.second is not None:
            rows, columns, view = direction.second
            second_rows, second_columns = (
                view_rows([s.rows_ND for s in sources], view or self.view).rows_nw for sources in ([rows], columns)
            )
            second = second_rows, second_columns
        sizes = [len(source.rows_ND) for source in direction.columns]
        device = self.scale.device
        kinds = [
            torch.full((size,), kind, dtype=torch.int8, device=device) for kind, size in zip(direction.kinds, sizes, strict=True)
        ]
        matrix = Matrix(
            row_RD=self._rows.rows_nw,
            column_PD=self._columns.rows_nw,
            kind_P=torch.cat(kinds),
            masks=direction.masks,
            scale=self.scale,
            positive_R=self.positive_R,
            row_values=direction.row_values,
            second=second,
            progress=self.progress,
            threshold_R=self._thresholds(self.positive_R),
            trains_rows=direction.rows.is_trained,
            num_trained_columns=sum(len(source.rows_ND) for source in direction.columns if source.is_trained),
        )
        self._tiles = Tiles(matrix, self.objective, self.tile_rows, self._kept)

    def _close(self) -> None:
        del self._rows, self._columns, self._tiles

    def _give_back(self, found: TileGradients, sibling_gradient: Tensor) -> None:
        siblings, direction = self.direction.siblings, self.direction
        rows_nw, columns_nw = self._rows.rows_nw, self._columns.rows_nw
        add_pair_gradients(found.row_RD, siblings.row, columns_nw, siblings.column, sibling_gradient)
        if direction.columns[list(direction.kinds).index(OTHER_SIDE)].is_trained:  # where siblings stand
            add_pair_gradients(found.column_PD, siblings.column, rows_nw, siblings.row, sibling_gradient)
        if found.row_RD is not None:
            direction.rows.add(self._rows.whole(found.row_RD.mul_(self.weight)), self.view)
        if found.column_PD is not None:
            norm = self._columns.norm_n1
            trained = ViewedRows(columns_nw[: len(found.column_PD)], None if norm is None else norm[: len(found.column_PD)])
            sources = [source for source in direction.columns if source.is_trained]
            pieces = trained.whole(found.column_PD.mul_(self.weight)).split([len(source.rows_ND) for source in sources])
            for source, piece in zip(sources, pieces, strict=True):
                source.add(piece, self.view)
        self._scale_gradient += found.scale
        self._parameters = found.parameters
        self.of_positive_R = found.positive_R
        self._close()

    def _give_back_own(self, gradient_B: Tensor) -> None:
        """Carry the gradient of the scores of the rows with their own positives back."""
        direction = self.direction
        if not self.objective.has_pair_scores:
            every = torch.arange(len(gradient_B), device=gradient_B.device)
            return self._give_back_pairs(direction.own_rows, every, direction.own_positives, every, gradient_B)
        sources = [direction.own_rows, direction.own_positives]
        viewed = [view_rows([source.rows_ND], self.view) for source in sources]
        found = pair_gradients(self.objective, viewed[0].rows_nw, viewed[1].rows_nw, gradient_B * self.weight)
        for source, own, gradient_Bw in zip(sources, viewed, found, strict=True):
            if source.is_trained:
                source.add(own.whole(gradient_Bw), self.view)
        return None

    def _give_back_pairs(self, rows: Source, row_c: Tensor, columns: Source, column_c: Tensor, gradient_c: Tensor) -> None:
        viewed = [view_rows([source.rows_ND], self.view) for source in (rows, columns)]
        for source, own, own_c, other, other_c in (
            (rows, viewed[0], row_c, viewed[1], column_c),
            (columns, viewed[1], column_c, viewed[0], row_c),
        ):
            if source.is_trained:
                total = torch.zeros(own.rows_nw.shape, dtype=source.gradient().dtype, device=gradient_c.device)
                add_pair_gradients(total, own_c, other.rows_nw, other_c, gradient_c * self.weight)
                source.add(own.whole(total), self.view)
