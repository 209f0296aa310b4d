"""An objective and its gradient, evaluated in tiles of rows over all columns.

Work: three matrix products, none of them repeated, at the matrix unit's rate. Memory: one tile of rows x columns and some
copies of a block of its rows, whatever the batch. The objective sees a block at a time, because on a CPU its passes over
a block that stays in the cache cost a tenth of what they cost over a tile in memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradcache.masks import Masks
from gradcache.objectives import Objective, Tile

# B rows, P columns, D width, t rows of one tile, b rows of one block

TILE_BYTES = {"cpu": 256 * 2**20, "cuda": 1024 * 2**20}  # scores of one tile, by type of device
BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}  # scores of one block: 4 MiB stay in a core's share of the cache


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

    row_BD, column_PD: detached, of one floating type, which is that of the products; scores, sums and gradients are float32,
    or float64 if they are.
    scale: inverse temperature. weight: factor of every row's loss, for the gradient alone.
    tile_rows: rows evaluated at once; None: as many as make TILE_BYTES.
    Raises ValueError, with the number of rows that fit, if a tile is larger than the memory.
    """
    row_BD, column_PD = _for_products(row_BD), _for_products(column_PD)
    dtype = torch.promote_types(row_BD.dtype, torch.float32)
    kind, row_bytes = row_BD.device.type, max(1, len(column_PD)) * dtype.itemsize
    tile_rows = min(tile_rows or max(1, TILE_BYTES.get(kind, TILE_BYTES["cuda"]) // row_bytes), max(1, len(row_BD)))
    block_rows = max(1, BLOCK_BYTES.get(kind, BLOCK_BYTES["cuda"]) // row_bytes)
    row_gradient_BD = torch.empty(row_BD.shape, dtype=dtype, device=row_BD.device)
    column_gradient_PD = torch.zeros(column_PD.shape, dtype=dtype, device=row_BD.device)
    tile_tP = _tile(tile_rows, column_gradient_PD)
    sums = torch.zeros(2, dtype=torch.float64, device=row_BD.device)  # of the loss, of the gradient of the scale
    starts = range(0, len(row_BD), tile_rows)
    for start in starts:
        rows = slice(start, min(start + tile_rows, len(row_BD)))
        score_tP = tile_tP[: rows.stop - start]
        _product(row_BD[rows], column_PD.T, out=score_tP)
        for block in _blocks(rows, block_rows, masks):
            gradient_bP = score_tP[block.rows.start - start : block.rows.stop - start]  # scores now, gradients after it
            sums[0] += _evaluate(gradient_bP, masks, block, scale, objective)
        gradient_tD = _product(score_tP.to(row_BD.dtype), column_PD)
        # score = logits / scale, and a row's gradients times its scores add up to its embedding times gradient_tD.
        sums[1] += (row_BD[rows] * gradient_tD).sum(dtype=torch.float64)
        row_gradient_BD[rows] = gradient_tD
        _add_product(column_gradient_PD, score_tP.T.to(row_BD.dtype), row_BD[rows])
    return TileGradients(sums[0], row_gradient_BD.mul_(scale * weight), column_gradient_PD.mul_(scale * weight), sums[1] * weight)


@dataclass(frozen=True)
class _Block:
    """Some rows, and where their pairs stand in the masks."""

    rows: slice
    pairs: slice


def _blocks(rows: slice, block_rows: int, masks: Masks) -> list[_Block]:
    starts = list(range(rows.start, rows.stop, block_rows))
    edges = torch.tensor([*starts, rows.stop], device=masks.pair_rows.device)
    pair_edges = torch.searchsorted(masks.pair_rows, edges).tolist()
    return [
        _Block(slice(start, min(start + block_rows, rows.stop)), slice(pair_edges[i], pair_edges[i + 1]))
        for i, start in enumerate(starts)
    ]


def _evaluate(score_bP: Tensor, masks: Masks, block: _Block, scale: float, objective: Objective) -> Tensor:
    """Return the sum of the block's losses, float64, and put the gradient of the logits in the place of the scores.

    The leaves of autograd are the logits after masking, so neither scaling nor masking keeps a copy of the block.
    """
    target_b1 = masks.target_B[block.rows][:, None]
    pairs = block.pairs
    cells = masks.pair_rows[pairs] - block.rows.start, masks.pair_columns[pairs]
    siblings = cells[0][masks.pair_is_sibling[pairs]], cells[1][masks.pair_is_sibling[pairs]]
    logits_bP = score_bP.mul_(scale)
    sibling_logits = logits_bP[siblings].requires_grad_()
    _fill_masked(logits_bP, target_b1, masks.repeated, cells, -torch.inf)
    logits_bP = logits_bP.detach().requires_grad_()
    with torch.enable_grad():
        losses = objective(
            Tile(
                logits_tP=logits_bP,
                target_t=target_b1[:, 0],
                sibling_rows=siblings[0],
                sibling_logits=sibling_logits,
            )
        )
        gradient_bP, sibling_gradient = torch.autograd.grad(losses.sum(), (logits_bP, sibling_logits), allow_unused=True)
    _fill_masked(gradient_bP, target_b1, masks.repeated, cells, 0)
    if sibling_gradient is not None:
        gradient_bP[siblings] = sibling_gradient
    score_bP.copy_(gradient_bP)
    return losses.detach().sum(dtype=torch.float64)


def _fill_masked(values_bP: Tensor, target_b1: Tensor, repeated: Tensor, cells: tuple[Tensor, Tensor], value: float) -> None:
    target_values_b1 = values_bP.gather(1, target_b1)  # a target may stand in a repeated column
    if len(repeated):
        values_bP.index_fill_(1, repeated, value)
    values_bP[cells] = value
    values_bP.scatter_(1, target_b1, target_values_b1)


def _tile(tile_rows: int, column_PD: Tensor) -> Tensor:
    """Return memory for the scores of one tile."""
    try:
        return column_PD.new_empty(tile_rows, len(column_PD))
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, plain on a CPU
        if "memory" not in str(error).lower():
            raise
        gib = tile_rows * len(column_PD) * column_PD.element_size() / 2**30
        raise ValueError(
            f"a tile of tile_rows={tile_rows} x {len(column_PD)} columns takes {gib:.1f} GiB, more than the memory of "
            f"{column_PD.device} has left; set tile_rows lower"
        ) from error


def _for_products(values: Tensor) -> Tensor:
    """Return values as the device multiplies them: a CPU has no fast product of half precision with float32 sums."""
    if values.device.type == "cuda" and values.dtype in (torch.bfloat16, torch.float16):
        return values
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left @ right with float32 sums, also of half-precision values."""
    if left.dtype in (torch.float32, torch.float64):
        return torch.mm(left, right, out=out)
    product = torch.mm(left, right, out_dtype=torch.float32)
    return product if out is None else out.copy_(product)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _product(left, right)
