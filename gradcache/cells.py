"""Scores of single pairs of rows, outside of the score matrix, and the way back of their gradients."""

import torch
from torch import Tensor

from gradcache.objectives.tile import Objective

# c cells, n and m rows, w width, b cells of a block

BLOCK_CELLS = 65536  # multiplied at once, so that two copies of the rows are never whole


def pair_scores(row_nw: Tensor, row_c: Tensor, column_mw: Tensor, column_c: Tensor) -> Tensor:
    """Return the dot product of each pair, (c,), in float32, or float64 if the rows are."""
    dtype = torch.promote_types(row_nw.dtype, torch.float32)
    scores_c = row_nw.new_empty(len(row_c), dtype=dtype)
    for score_b, row_b, column_b in zip(
        scores_c.split(BLOCK_CELLS), row_c.split(BLOCK_CELLS), column_c.split(BLOCK_CELLS), strict=True
    ):
        score_b.copy_((row_nw[row_b].to(dtype) * column_mw[column_b].to(dtype)).sum(1))
    return scores_c


def add_pair_gradients(total_nw: Tensor | None, row_c: Tensor, column_mw: Tensor, column_c: Tensor, gradient_c: Tensor) -> None:
    """Add to the rows' gradient what their pairs' scores give them; None: the rows have none. For columns swap the sides."""
    if total_nw is None:
        return
    for row_b, column_b, gradient_b in zip(
        row_c.split(BLOCK_CELLS), column_c.split(BLOCK_CELLS), gradient_c.split(BLOCK_CELLS), strict=True
    ):
        total_nw.index_add_(0, row_b, column_mw[column_b].to(total_nw.dtype) * gradient_b[:, None].to(total_nw.dtype))


def own_scores(objective: Objective, row_Bw: Tensor, positive_Bw: Tensor) -> Tensor:
    """Return the raw score of each row with its own positive, (B,), as the objective scores a pair."""
    if not objective.has_pair_scores:
        every = torch.arange(len(row_Bw), device=row_Bw.device)
        return pair_scores(row_Bw, every, positive_Bw, every)
    dtype = torch.promote_types(row_Bw.dtype, torch.float32)
    with torch.no_grad():
        return objective.pair_scores(row_Bw.to(dtype), positive_Bw.to(dtype))


def pair_gradients(objective: Objective, row_Bw: Tensor, positive_Bw: Tensor, gradient_B: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of rows and positives, given that of the scores of `own_scores`."""
    dtype = torch.promote_types(row_Bw.dtype, torch.float32)
    leaves = [rows.detach().to(dtype).requires_grad_() for rows in (row_Bw, positive_Bw)]
    with torch.enable_grad():
        scores_B = objective.pair_scores(*leaves)
    return torch.autograd.grad(scores_B, leaves, gradient_B.to(scores_B.dtype))
