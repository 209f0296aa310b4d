"""How the raw scores of a tile become statistics, and how these' derivative becomes the gradient of the scores.

`ByAutograd` takes any objective. The two others take those of the soft-max kind, whose statistic is the log-sum-exp of the
logits: `InClosedForm` with half the passes over a block, `ByKernel` with one read for the statistic, one read and one write for
the gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from gradcache import fused
from gradcache.blocks import Blocks
from gradcache.compiled import compiled_statistics
from gradcache.matrix import Matrix, TileGradients
from gradcache.objectives.tile import FLOOR, Objective, Tile, trained_parameters
from gradcache.products import for_products, product
from gradcache.soft_max import Largest, put_gradient, take_soft_max

# P columns, S statistics, t rows of one tile, b rows of one block


@dataclass
class Kept:
    """What stays between the statistics of a matrix and its gradients."""

    scores: dict[int, Tensor] = field(default_factory=dict)  # by tile; in closed form their soft-max
    largest: dict[int, Largest] = field(default_factory=dict)  # by block, or by tile


Derivative = Callable[[slice, Tensor], Tensor]  # of the loss of some rows, from their statistics (b, S) to these, (b, S)


class Pass(Protocol):
    """What is done with one tile of raw scores, FLOOR where masked."""

    def statistics(self, score_tP: Tensor, rows: slice, is_kept: bool) -> Tensor:
        """Return the statistics of some rows, (t, S). is_kept: `gradient` gets the same scores, as this call has left them."""

    def gradient(
        self, score_tP: Tensor, rows: slice, derivative: Derivative, total: TileGradients, is_kept: bool
    ) -> tuple[Tensor, bool]:
        """Return the gradient of the raw scores, which may stand in their place, and whether that of the scale is in the total.

        Where it is not, the scale acted on the scores alone, and its gradient follows from that of the rows.
        """


class ByAutograd:
    """Any objective, block by block; with `compiles` its passes over a block are fused by torch.compile."""

    def __init__(self, matrix: Matrix, objective: Objective, blocks: Blocks, compiles: bool):
        self._matrix, self._objective, self._blocks, self._compiles = matrix, objective, blocks, compiles

    def statistics(self, score_tP: Tensor, rows: slice, is_kept: bool) -> Tensor:
        """See `Pass`."""
        found = [self._statistics(self._tile(score_tP[place], block)) for block, place in self._blocks.of(rows)]
        return torch.cat(found)

    def gradient(
        self, score_tP: Tensor, rows: slice, derivative: Derivative, total: TileGradients, is_kept: bool
    ) -> tuple[Tensor, bool]:
        """See `Pass`."""
        has_scale = True
        for block, place in self._blocks.of(rows):
            has_scale = self._differentiate(score_tP[place], block, derivative, total)
        return score_tP, has_scale

    def _differentiate(self, score_bP: Tensor, block: slice, derivative: Derivative, total: TileGradients) -> bool:
        """Put the gradient of a block's scores in their place; return whether that of the scale is in the total."""
        matrix = self._matrix
        leaves = {"scores": score_bP.detach().requires_grad_(), "scale": matrix.scale.detach().requires_grad_()}
        if self._objective.returns_positive:
            leaves["positive"] = matrix.positive_R[block].detach().requires_grad_()

        def logits() -> Tensor:
            if "logits" not in leaves:
                leaves["logits"] = (score_bP.detach() * matrix.scale.detach()).requires_grad_()
            return leaves["logits"]

        with torch.enable_grad():
            tile = self._tile(leaves["scores"], block, leaves["scale"], leaves.get("positive"), logits)
            statistics_bS = self._statistics(tile)
        derivative_bS = derivative(block, statistics_bS.detach()).to(statistics_bS.dtype)
        wanted = [*leaves.values(), *trained_parameters(self._objective)]
        found = torch.autograd.grad(statistics_bS, wanted, derivative_bS, allow_unused=True)
        gradient = dict(zip(leaves, found, strict=False))
        for sum_of, value in zip(total.parameters, found[len(leaves) :], strict=True):
            if value is not None:
                sum_of += value
        if gradient["scale"] is not None:
            total.scale += gradient["scale"]
        if total.positive_R is not None and gradient.get("positive") is not None:
            total.positive_R[block] += gradient["positive"]
        return self._put(score_bP, block, gradient.get("logits"), gradient["scores"], total)

    def _put(
        self, score_bP: Tensor, block: slice, of_logits: Tensor | None, of_scores: Tensor | None, total: TileGradients
    ) -> bool:
        """Put both gradients together; return whether that of the scale is in the total."""
        has_scale = of_logits is None or of_scores is not None or not self._matrix.trains_rows
        is_dropped = None if self._matrix.threshold_R is None else score_bP <= FLOOR / 2
        if of_logits is None:
            score_bP.zero_() if of_scores is None else score_bP.copy_(of_scores)
        else:
            self._blocks.fill(of_logits, block, 0.0)
            if is_dropped is not None:
                of_logits.masked_fill_(is_dropped, 0.0)
            if has_scale:
                total.scale += (of_logits * score_bP).sum(dtype=torch.float64)
            torch.mul(of_logits, self._matrix.scale, out=score_bP)
            if of_scores is not None:
                score_bP.add_(of_scores)
        if of_scores is not None:
            self._blocks.fill(score_bP, block, 0.0)
            if is_dropped is not None:
                score_bP.masked_fill_(is_dropped, 0.0)
        return has_scale

    def _statistics(self, tile: Tile) -> Tensor:
        return compiled_statistics(self._objective, tile) if self._compiles else self._objective.statistics(tile)

    def _tile(self, score_bP: Tensor, block: slice, scale=None, positive_b=None, make_logits=None) -> Tile:
        matrix = self._matrix
        second = None
        if matrix.second is not None:
            second = product(for_products(matrix.second[0][block]), for_products(matrix.second[1]).T)
        return Tile(
            scores_tP=score_bP,
            scale=matrix.scale if scale is None else scale,
            positive_t=matrix.positive_R[block] if positive_b is None else positive_b,
            kind_P=matrix.kind_P,
            row_values={name: values[block] for name, values in matrix.row_values.items()},
            second_tP=second,
            progress=matrix.progress,
            make_logits=make_logits,
        )


class InClosedForm:
    """Rows of the soft-max kind that have a gradient, in plain torch, block by block; it keeps their soft-max as the scores."""

    def __init__(self, matrix: Matrix, hardness: float, blocks: Blocks, kept: Kept):
        self._scale, self._exponent, self._blocks, self._largest = matrix.scale, matrix.scale + hardness, blocks, kept.largest

    def statistics(self, score_tP: Tensor, rows: slice, is_kept: bool) -> Tensor:
        """See `Pass`."""
        found = []
        for block, place in self._blocks.of(rows):
            self._largest[block.start] = largest = take_soft_max(score_tP[place], self._exponent, is_kept)
            found.append(largest.log_sum_exp())
        return torch.cat(found)[:, None]

    def gradient(
        self, score_tP: Tensor, rows: slice, derivative: Derivative, total: TileGradients, is_kept: bool
    ) -> tuple[Tensor, bool]:
        """See `Pass`."""
        for block, place in self._blocks.of(rows):
            largest, is_soft_max = self._largest.pop(block.start, None), is_kept
            if largest is None:  # one sweep
                largest, is_soft_max = take_soft_max(score_tP[place], self._exponent, keeps=True), True
            derivative_b = derivative(block, largest.log_sum_exp()[:, None])[:, 0].to(score_tP.dtype)
            put_gradient(score_tP[place], self._exponent, largest, derivative_b * self._scale, is_soft_max)
        return score_tP, False


class ByKernel:
    """Rows of the soft-max kind by the kernels of `gradcache/fused.py`; the gradient comes in the type of the products."""

    def __init__(self, matrix: Matrix, hardness: float, dtype: torch.dtype, kept: Kept):
        self._matrix, self._exponent, self._dtype, self._largest = matrix, matrix.scale + hardness, dtype, kept.largest

    def statistics(self, score_tP: Tensor, rows: slice, is_kept: bool) -> Tensor:
        """See `Pass`."""
        self._largest[rows.start] = largest = fused.row_largest(score_tP, self._exponent)
        return largest.log_sum_exp()[:, None]

    def gradient(
        self, score_tP: Tensor, rows: slice, derivative: Derivative, total: TileGradients, is_kept: bool
    ) -> tuple[Tensor, bool]:
        """See `Pass`."""
        scale = self._matrix.scale
        largest = self._largest.pop(rows.start, None)
        if largest is None:  # one sweep
            largest = fused.row_largest(score_tP, self._exponent)
        derivative_t = derivative(rows, largest.log_sum_exp()[:, None])[:, 0].to(score_tP.dtype)
        if not self._matrix.trains_rows:
            soft_max_tP = fused.soft_max_gradient(score_tP, self._exponent, largest, derivative_t, torch.empty_like(score_tP))
            total.scale += (soft_max_tP * score_tP).sum(dtype=torch.float64)
        out_tP = score_tP if self._dtype == score_tP.dtype else torch.empty_like(score_tP, dtype=self._dtype)
        gradient_tP = fused.soft_max_gradient(score_tP, self._exponent, largest, derivative_t * scale, out_tP)
        return gradient_tP, not self._matrix.trains_rows
