"""InfoNCE with one positive or with all judged positives of a row.

Source: van den Oord et al. 2018 (arXiv 1807.03748); in-batch negatives as in Karpukhin et al. 2020 (arXiv 2004.04906);
several positives, each against the negatives alone, as in Khosla et al. 2020 (arXiv 2004.11362), L_out, but with the
other positives left out of the denominator.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gradcache.objectives.tile import Tile


def info_nce(tile: Tile) -> Tensor:
    """Return -log softmax of each row's own positive among it and the negatives, (t,)."""
    return log_sum_exp(tile.logits_tP) - _target_logits(tile)


def info_nce_multi(tile: Tile) -> Tensor:
    """Return the mean over a row's positives of -log softmax of each among itself and the negatives, (t,)."""
    num_rows = len(tile.target_t)
    positive = torch.cat([_target_logits(tile), tile.sibling_logits])
    row = torch.cat([torch.arange(num_rows, device=positive.device), tile.sibling_rows])
    negatives_t = log_sum_exp(tile.logits_tP.scatter(1, tile.target_t[:, None], -torch.inf))
    # -log softmax = log(1 + exp(negatives - positive)), which is 0 for a row without negatives.
    loss = softplus(negatives_t[row] - positive)
    return loss.new_zeros(num_rows).index_add(0, row, loss) / torch.bincount(row, minlength=num_rows)


def log_sum_exp(logits_tP: Tensor) -> Tensor:
    """Return `logits_tP.logsumexp(1)`, (t,), -inf for a row of nothing else; two passes forward, one backward.

    The soft-max that is its gradient comes first, in torch's fused kernel, and holds the sum in its largest entry. Plain
    torch computes the exponentials twice and passes over the tile six times.
    """
    return _LogSumExp.apply(logits_tP)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_tP: Tensor) -> Tensor:
        most_t = logits_tP.amax(1)
        softmax_tP = torch.softmax(logits_tP, 1)
        is_empty_t = most_t == -torch.inf
        if bool(is_empty_t.any()):
            softmax_tP.masked_fill_(is_empty_t[:, None], 0)
        ctx.save_for_backward(softmax_tP)
        # The largest entry is at least 1 / columns, so its logarithm is exact to a rounding.
        return torch.where(is_empty_t, most_t, most_t - softmax_tP.amax(1).log())

    @staticmethod
    def backward(ctx, gradient_t: Tensor) -> Tensor:
        (softmax_tP,) = ctx.saved_tensors
        return softmax_tP.mul_(gradient_t[:, None])  # nobody reads it a second time


def _target_logits(tile: Tile) -> Tensor:
    return tile.logits_tP.gather(1, tile.target_t[:, None])[:, 0]
