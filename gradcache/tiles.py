"""An objective and its gradient, evaluated in tiles of rows over all columns.

Work: three matrix products, none of them repeated. Memory: a few copies of one tile of rows x columns, whatever the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradcache.masks import Masks
from gradcache.objectives import Objective, Tile

# B rows, P columns, D width, t rows of one tile

TILE_BYTES = 256 * 2**20  # scores of one tile; an objective holds about four tensors of this size at once


@dataclass(frozen=True)
class TileGradients:
    """The loss of some rows, and the gradient of `weight` times its sum."""

    loss_sum: Tensor  # scalar float64
    row_BD: Tensor
    column_PD: Tensor
    scale: Tensor  # scalar float64


def evaluate_tiles(
    row_BD: Tensor,
    column_PD: Tensor,
    masks: Masks,
    scale: float,
    objective: Objective,
    weight: float,
    tile_rows: int | None = None,
) -> TileGradients:
    """Return the objective of all rows, and its gradient.

    row_BD, column_PD: detached, of any floating type; scores and sums are float32, or float64 if they are.
    scale: inverse temperature. weight: factor of every row's loss, for the gradient alone.
    tile_rows: rows evaluated at once; None: as many as make TILE_BYTES.
    """
    dtype = torch.promote_types(row_BD.dtype, torch.float32)
    row_BD, column_PD = row_BD.to(dtype), column_PD.to(dtype)
    if tile_rows is None:
        tile_rows = max(1, TILE_BYTES // max(1, len(column_PD) * dtype.itemsize))
    row_gradient_BD, column_gradient_PD = torch.empty_like(row_BD), torch.zeros_like(column_PD)
    sums = torch.zeros(2, dtype=torch.float64, device=row_BD.device)  # of the loss, of the gradient of the scale
    starts = list(range(0, len(row_BD), tile_rows))
    edges = torch.tensor([*starts, len(row_BD)], device=row_BD.device)
    pair_edges = torch.searchsorted(masks.pair_rows, edges).tolist()
    for number, start in enumerate(starts):
        rows = slice(start, start + tile_rows)
        pairs = slice(pair_edges[number], pair_edges[number + 1])
        score_tP = row_BD[rows] @ column_PD.T
        losses, gradient_tP, scale_gradient = _evaluate(score_tP, masks, rows, pairs, scale, objective, weight)
        row_gradient_BD[rows] = gradient_tP @ column_PD
        column_gradient_PD.addmm_(gradient_tP.T, row_BD[rows])
        sums += torch.stack([losses.sum(dtype=torch.float64), scale_gradient.double()])
    return TileGradients(sums[0], row_gradient_BD, column_gradient_PD, sums[1])


def _evaluate(
    score_tP: Tensor, masks: Masks, rows: slice, pairs: slice, scale: float, objective: Objective, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (t,), the gradient of the scores (t, P), and that of the scale. Overwrites score_tP.

    The leaves of autograd are the logits after masking, so neither scaling nor masking keeps a copy of the tile.
    """
    target_t1 = masks.target_B[rows][:, None]
    cells = masks.pair_rows[pairs] - rows.start, masks.pair_columns[pairs]
    siblings = cells[0][masks.pair_is_sibling[pairs]], cells[1][masks.pair_is_sibling[pairs]]
    logits_tP = score_tP.mul_(scale)
    sibling_logits = logits_tP[siblings].requires_grad_()
    _fill_masked(logits_tP, target_t1, masks.repeated, cells, -torch.inf)
    logits_tP.requires_grad_()
    with torch.enable_grad():
        losses = objective(
            Tile(
                logits_tP=logits_tP,
                target_t=target_t1[:, 0],
                sibling_rows=siblings[0],
                sibling_logits=sibling_logits,
            )
        )
        gradient_tP, sibling_gradient = torch.autograd.grad(losses.sum() * weight, (logits_tP, sibling_logits), allow_unused=True)
    logits_tP, sibling_logits = logits_tP.detach(), sibling_logits.detach()
    _fill_masked(gradient_tP, target_t1, masks.repeated, cells, 0)
    _fill_masked(logits_tP, target_t1, masks.repeated, cells, 0)  # 0 x -inf would be NaN in the product below
    if sibling_gradient is not None:
        gradient_tP[siblings] = sibling_gradient
        logits_tP[siblings] = sibling_logits
    # score = logits / scale, so the gradient of the scale is sum(gradient x logits) / scale.
    scale_gradient = torch.dot(gradient_tP.flatten(), logits_tP.flatten()) / scale
    return losses.detach(), gradient_tP.mul_(scale), scale_gradient


def _fill_masked(values_tP: Tensor, target_t1: Tensor, repeated: Tensor, cells: tuple[Tensor, Tensor], value: float) -> None:
    target_values_t1 = values_tP.gather(1, target_t1)  # a target may stand in a repeated column
    values_tP.index_fill_(1, repeated, value)
    values_tP[cells] = value
    values_tP.scatter_(1, target_t1, target_values_t1)
