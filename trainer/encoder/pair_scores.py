"""The scores of single pairs of query and passage, each summed in one fixed order.

A matrix product may sum in another order when it stands in another tile. Here the last bit of a score is a function of the two
embeddings alone, whatever other pairs are scored beside it. On a GPU the order is written out sum by sum, and float32 products
are rounded before they are added, so that the kernel and plain torch agree to the bit; a CPU has numpy's order.
"""

import functools
import logging

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

PAIRS_BYTES = 64 << 20  # of embeddings that are gathered at once
# Of a GPU's sums: lane l adds up the products l, l + LANES, ...; then neighbours are added until one is left.
LANES, HALVINGS = 256, 8
PAIRS_AT_ONCE, NUM_WARPS = 8, 4  # of a program: 16 numbers a thread


def score_pairs(query_QD: Tensor, passage_ND: Tensor, query_n: Tensor, passage_n: Tensor) -> Tensor:
    """Return the inner product of each pair, (n,) float32, on the device of the embeddings. Nothing waits for a GPU.

    query_QD, passage_ND: float16 or float32, on one device. query_n, passage_n: (n,) int64 rows of each, there too.
    """
    if query_QD.is_cuda:
        score = pair_scores_by_kernel if can_launch(query_QD.device) else plain_pair_scores
        return score(query_QD, passage_ND, query_n, passage_n)
    queries, passages = query_QD.numpy(), passage_ND.numpy()
    scores = np.empty(len(query_n), np.float32)
    step = max(1, PAIRS_BYTES // (8 * queries.shape[1]))
    for start in range(0, len(scores), step):
        pairs = slice(start, start + step)
        left, right = queries[query_n[pairs].numpy()], passages[passage_n[pairs].numpy()]
        scores[pairs] = np.multiply(left, right, dtype=np.float32).sum(1)
    return torch.from_numpy(scores)


def pair_scores_by_kernel(query_QD: Tensor, passage_ND: Tensor, query_n: Tensor, passage_n: Tensor) -> Tensor:
    """Return what `plain_pair_scores` does, to the bit; numbers of a row lie side by side."""
    score_n = torch.empty(len(query_n), device=query_QD.device)
    if len(query_n):
        from trainer.encoder.topk_kernels import pair_scores_kernel

        assert query_QD.stride(1) == passage_ND.stride(1) == 1
        with torch.cuda.device_of(query_QD):  # Triton launches on the current device
            pair_scores_kernel[(-(-len(query_n) // PAIRS_AT_ONCE),)](
                query_QD,
                passage_ND,
                query_n.contiguous(),
                passage_n.contiguous(),
                score_n,
                len(query_n),
                query_QD.stride(0),
                passage_ND.stride(0),
                query_QD.shape[1],
                R=PAIRS_AT_ONCE,
                L=LANES,
                HALVINGS=HALVINGS,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,  # a fused product is not rounded
            )
    return score_n


def plain_pair_scores(query_QD: Tensor, passage_ND: Tensor, query_n: Tensor, passage_n: Tensor) -> Tensor:
    """Return the scores of pairs in the order of a GPU's sums, on any device."""
    step = max(1, PAIRS_BYTES // (8 * query_QD.shape[1]))
    parts = zip(query_n.split(step), passage_n.split(step), strict=True)
    scores = [sums_of_pairs(query_QD[left], passage_ND[right]) for left, right in parts]
    return torch.cat(scores) if scores else torch.empty(0, device=query_QD.device)


def sums_of_pairs(left_nD: Tensor, right_nD: Tensor) -> Tensor:
    """Return the inner products of rows, (n,) float32: the order of a GPU's sums, as it is defined."""
    (num_pairs, width), lanes = left_nD.shape, LANES
    sum_nL = torch.zeros(num_pairs, lanes, device=left_nD.device)
    for start in range(0, width, lanes):
        part = slice(start, min(start + lanes, width))
        sum_nL[:, : part.stop - start] += left_nD[:, part].float() * right_nD[:, part].float()
    while sum_nL.shape[1] > 1:
        sum_nL = sum_nL[:, 0::2] + sum_nL[:, 1::2]
    return sum_nL[:, 0]


@functools.cache
def can_launch(device: torch.device) -> bool:
    """Return whether a kernel runs here; Triton builds its launcher by the machine's C compiler, which may be missing."""
    one, first = torch.ones(1, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    try:
        pair_scores_by_kernel(one, one, first, first)
    except Exception as error:  # of many types, none of them ours
        log.warning("Triton does not work on %s (%s); exact search runs in plain torch, slower", device, error)
        return False
    return True
