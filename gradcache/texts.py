"""Terms of the loss that see one text alone."""

import torch
from torch import Tensor

from gradcache.batch import Batch
from gradcache.options import LossOptions
from gradcache.transfers import upload

# n rows of this rank, D width of all outputs


def text_terms(options: LossOptions, batch: Batch, rows_nD: Tensor, gradient_nD: Tensor, num_rows: int) -> Tensor:
    """Return this rank's part of the terms of single texts, float64, and add their gradient to `gradient_nD`.

    num_rows: of all ranks, over which each term is a mean. Does not communicate.
    """
    total = torch.zeros((), dtype=torch.float64, device=rows_nD.device)
    keys_n = upload(batch.keys, rows_nD.device)
    for term in options.text_terms:
        leaf_nD = rows_nD.detach().to(gradient_nD.dtype).requires_grad_()
        with torch.enable_grad():
            loss = term.function(leaf_nD, keys_n).sum() * (term.weight / num_rows)
        total += loss.detach()
        if loss.requires_grad:
            gradient_nD += torch.autograd.grad(loss, leaf_nD)[0]
    return total
