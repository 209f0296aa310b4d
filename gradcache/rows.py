"""The loss of this rank's rows from their merged statistics and picked cells, and its derivatives: phase 4's end.

What it costs does not depend on the number of columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradcache.masks import as_integers, starts_of
from gradcache.objectives.tile import Cells, Objective, Rows, merge_all, trained_parameters

# B rows of this rank, b some of them, S statistics, W tiles that are merged, c cells


@dataclass(frozen=True)
class PickedCells:
    """Cells of all rows of this rank, sorted by row."""

    row_c: Tensor
    kind_c: Tensor
    score_c: Tensor
    values: Mapping[str, Tensor]
    start: Sequence[int]  # (B + 1,) on the host: where the cells of a row begin
    order_c: Tensor  # where each cell stood in the parts it came from
    sizes: list[int]  # of these parts

    def by_part(self, gradient_c: Tensor) -> list[Tensor]:
        """Return the cells' values in the order of the parts that they came from."""
        found = torch.empty_like(gradient_c)
        found[self.order_c] = gradient_c
        return list(found.split(self.sizes))

    def of(self, rows: slice) -> slice:
        """Return where the cells of some rows stand."""
        return slice(int(self.start[rows.start]), int(self.start[rows.stop]))


def picked(parts: list[tuple[int, Tensor, Tensor, Mapping[str, Tensor]]], num_of_rows: Tensor, names: list[str]) -> PickedCells:
    """Return cells in the order of rows, from (kind, rows, scores, values) of each kind; a value that a kind lacks is NaN.

    num_of_rows: (B,) on the host: how many cells of all kinds each row has.
    """
    rows = torch.cat([row for _, row, _, _ in parts])
    kinds = torch.cat([torch.full_like(row, kind, dtype=torch.int8) for kind, row, _, _ in parts])
    scores = torch.cat([score for _, _, score, _ in parts])
    values = {
        name: torch.cat([known.get(name, torch.full_like(score, torch.nan)).to(score) for _, _, score, known in parts])
        for name in names
    }
    start = as_integers(starts_of(num_of_rows))
    order = rows.argsort(stable=True)
    sizes = [len(row) for _, row, _, _ in parts]
    return PickedCells(rows[order], kinds[order], scores[order], {n: v[order] for n, v in values.items()}, start, order, sizes)


@dataclass
class RowLoss:
    """A sum of losses that is evaluated piece by piece, and the gradients of what it depends on."""

    objective: Objective
    scale: Tensor  # scalar
    positive_B: Tensor
    cells: PickedCells
    values: Mapping[str, Tensor]  # (B,) each
    progress: float
    is_joint: bool = False
    threshold_B: Tensor | None = None
    loss_sum: Tensor = field(init=False)
    scale_gradient: Tensor = field(init=False)
    positive_gradient_B: Tensor = field(init=False)
    cell_gradient_c: Tensor = field(init=False)
    parameters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.scale.device)
        self.scale_gradient = self.loss_sum.clone()
        self.positive_gradient_B = torch.zeros_like(self.positive_B)
        self.cell_gradient_c = torch.zeros_like(self.cells.score_c)
        self.parameters = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in trained_parameters(self.objective)]

    def derivative(self, rows: slice, statistics_bS: Tensor) -> Tensor:
        """Add some rows' losses, and return the derivative to their statistics, (b, S)."""
        return self.evaluate(rows, statistics_bS[None])[0]

    def evaluate(self, rows: slice, parts_WbS: Tensor) -> Tensor:
        """Add some rows' losses, and return the derivative to the statistics of each of the tiles, (W, b, S)."""
        leaves = self._leaves(rows, parts_WbS)
        with torch.enable_grad():
            loss = self._sum(self._rows(rows, leaves))
        self.loss_sum += loss.detach()
        return self._collect(rows, leaves, self._differentiate(loss, leaves))

    def begin_batch(self, parts_WBS: Tensor, rows_of_ranks: Sequence[int]) -> Tensor:
        """Return what this rank's rows add to the numbers of the whole batch, (S2,); `finish_batch` goes on from it.

        rows_of_ranks: how many each rank has.
        """
        rows = slice(0, len(self.positive_B))
        leaves = self._leaves(rows, parts_WBS)
        with torch.enable_grad():
            own = self.objective.batch_statistics(self._rows(rows, leaves)) if len(self.positive_B) else None
            local = self._gathered(own, max(rows_of_ranks)) if self.objective.gathered_width else self._merged(own)
        self._begun = rows, leaves, local, rows_of_ranks
        return local.detach()

    def _merged(self, own_BS: Tensor | None) -> Tensor:
        merges = self.objective.batch_merges
        nothing = torch.cat([self.scale.new_full((1, 1, merge.width), merge.identity) for merge in merges], 2)
        return merge_all(nothing if own_BS is None else torch.cat([nothing, own_BS[:, None]]), merges)[0]

    def _gathered(self, own_BS: Tensor | None, most_rows: int) -> Tensor:
        width = self.objective.gathered_width
        if own_BS is None:
            return self.scale.new_zeros(most_rows * width)
        return torch.nn.functional.pad(own_BS, (0, 0, 0, most_rows - len(own_BS))).flatten()

    def _of_batch(self, batch_WS: Tensor, rows_of_ranks: Sequence[int]) -> Tensor:
        """Return what the loss sees of the batch: merged numbers, or those of all rows, rank by rank."""
        if not self.objective.gathered_width:
            return merge_all(batch_WS[:, None], self.objective.batch_merges)[0]
        of_ranks = zip(batch_WS.unflatten(1, (-1, self.objective.gathered_width)), rows_of_ranks, strict=True)
        return torch.cat([of_rank[:num_rows] for of_rank, num_rows in of_ranks])

    def evaluate_batch(self, batch_WS: Tensor) -> Tensor:
        """Add the losses, given every rank's numbers of the batch, and return the derivative to all of these, (W, S2)."""
        rows, leaves, _, rows_of_ranks = self._begun
        batch_leaf = batch_WS.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._sum(self._rows(rows, leaves, self._of_batch(batch_leaf, rows_of_ranks)))
        self.loss_sum += loss.detach()
        if not loss.requires_grad:
            self._direct: list[Tensor | None] = [None] * (len(leaves) + len(self.parameters))
            return torch.zeros_like(batch_WS)
        *self._direct, of_batch = self._differentiate(loss, leaves, batch_leaf, retain=True)
        return torch.zeros_like(batch_WS) if of_batch is None else of_batch

    def finish_batch(self, derivative_S: Tensor) -> Tensor:
        """Return the derivative to the statistics of each tile, given that of all ranks' losses to this rank's numbers."""
        rows, leaves, local, _ = self._begun
        if local.requires_grad:
            through = self._differentiate((local * derivative_S).sum(), leaves)
            self._direct = [b if a is None else a if b is None else a + b for a, b in zip(self._direct, through, strict=True)]
        return self._collect(rows, leaves, self._direct)

    def _leaves(self, rows: slice, parts_WbS: Tensor) -> list[Tensor]:
        cells = self.cells.of(rows)
        taken = [parts_WbS, self.positive_B[rows], self.cells.score_c[cells], self.scale]
        return [values.detach().requires_grad_() for values in taken]

    def _rows(self, rows: slice, leaves: list[Tensor], batch: Tensor | None = None) -> Rows:
        parts, positive, score_c, scale = leaves
        at = self.cells.of(rows)
        return Rows(
            statistics_tS=parts[0] if len(parts) == 1 else merge_all(parts, self.objective.merges),
            scale=scale,
            positive_t=positive,
            cells=Cells(
                row_c=self.cells.row_c[at] - rows.start,
                kind_c=self.cells.kind_c[at],
                score_c=score_c,
                values={name: values[at] for name, values in self.cells.values.items()},
            ),
            values={name: values[rows] for name, values in self.values.items()},
            threshold_t=None if self.threshold_B is None else self.threshold_B[rows],
            batch=batch,
            is_joint=self.is_joint,
            progress=self.progress,
        )

    def _sum(self, rows: Rows) -> Tensor:
        losses_t = self.objective.loss(rows)
        if "weight" in rows.values:
            losses_t = losses_t * rows.values["weight"]
        return losses_t.sum(dtype=torch.float64)

    def _differentiate(self, loss: Tensor, leaves: list[Tensor], *more: Tensor, retain: bool = False) -> list[Tensor | None]:
        wanted = [*leaves, *trained_parameters(self.objective), *more]
        if not loss.requires_grad:
            return [None] * len(wanted)
        return list(torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=retain))

    def _collect(self, rows: slice, leaves: list[Tensor], found: Sequence[Tensor | None]) -> Tensor:
        parts, positive, score, scale, *parameters = found
        if positive is not None:
            self.positive_gradient_B[rows] += positive
        if score is not None:
            self.cell_gradient_c[self.cells.of(rows)] += score
        if scale is not None:
            self.scale_gradient += scale
        for total, gradient in zip(self.parameters, parameters, strict=True):
            if gradient is not None:
                total += gradient
        return torch.zeros_like(leaves[0]) if parts is None else parts
