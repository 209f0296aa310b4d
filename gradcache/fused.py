"""The soft-max of each row of a tile: its largest weight, and its gradient; one pass over the scores each, by Triton on GPUs.

They serve objectives whose statistic of a row is the log-sum-exp of `scale * score` over the columns. Masked scores hold
FLOOR, so that they weigh nothing; a row of nothing else has FLOOR * scale as its largest logit, by which the gradient knows
that it has no negatives. That holds for a scale of 1e-3 and more. Nothing here waits for the device.

The plain versions are the reference and run anywhere; they hold two or three more tiles of scores.
Proven so far: the kernels' arithmetic under Triton's interpreter on a CPU, which finds no races, and that they compile for
NVIDIA's architectures 8.0 and 9.0. Not yet run or timed on a GPU.
"""

import functools
import logging
import os

import torch
from torch import Tensor

from gradcache.objectives.tile import FLOOR
from gradcache.soft_max import Largest

# t rows of the tile, P columns

log = logging.getLogger(__name__)
# A program reads 4,096 scores at a time with 8 warps of 32 threads: 4 loads of 16 bytes a thread, 16 KiB in all. An H100
# needs some 20 KiB under way to each of its 132 multiprocessors (3.35 TB/s times a latency of 0.8 microseconds, an estimate).
# 512 rows put 4 programs on each, and 5 fit (47 registers a thread), so one program a row is enough; fewer than 132 rows
# leave some multiprocessors idle.
BLOCK, NUM_WARPS = 4096, 8


def can_fuse(scores_tP: Tensor) -> bool:
    """Return whether the kernels take these scores: float32, on a GPU or under TRITON_INTERPRET=1, where Triton works."""
    runs = scores_tP.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and scores_tP.dtype == torch.float32 and _launches(scores_tP.device)


def row_largest(scores_tP: Tensor, scale: Tensor) -> Largest:
    """Return the largest of `scale * scores` of each row, and its share of the soft-max; of no columns FLOOR * scale.

    scores_tP: float32, finite; rows may be strided, columns not. Where the number of columns and the row stride are
    multiples of 16, a thread loads 16 bytes at once.
    scale: scalar float32 on the same device, more than 0.
    """
    num_rows, num_columns = scores_tP.shape
    if not num_columns:
        return _without_columns(scores_tP, scale)
    logit_t, share_t = scores_tP.new_empty(num_rows), scores_tP.new_empty(num_rows)
    if num_rows:
        from gradcache.kernels import row_largest_kernel

        assert scores_tP.dtype == scale.dtype == torch.float32 and _has_dense_columns(scores_tP)
        with torch.cuda.device_of(scores_tP):  # Triton launches on the current device
            row_largest_kernel[(num_rows,)](
                scores_tP, scale, logit_t, share_t, num_columns, scores_tP.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return Largest(logit_t, share_t)


def soft_max_gradient(scores_tP: Tensor, scale: Tensor, largest: Largest, gradient_t: Tensor, out_tP: Tensor) -> Tensor:
    """Fill out_tP with gradient_t times the soft-max of `scale * scores`, and return it; zero for rows without negatives.

    scores_tP, scale: as in `row_largest`. largest: what that returned; up to FLOOR / 2 * scale the row has no negatives.
    gradient_t: (t,) float32, of the loss with respect to the log-sum-exp. Leave a weight of 1 / rows out where out_tP is
    float16, which holds no number below 6e-8.
    out_tP: bfloat16, float16 or float32; rows may be strided, columns not; it may be scores_tP itself.
    """
    num_rows, num_columns = scores_tP.shape
    if num_rows and num_columns:
        from gradcache.kernels import soft_max_gradient_kernel

        assert scores_tP.dtype == scale.dtype == largest.logit_b.dtype == largest.share_b.dtype == gradient_t.dtype
        assert scores_tP.dtype == torch.float32 and _has_dense_columns(scores_tP) and _has_dense_columns(out_tP)
        with torch.cuda.device_of(scores_tP):
            # Blocks are independent here, so that few rows keep a GPU busy, too.
            soft_max_gradient_kernel[(num_rows * -(-num_columns // BLOCK),)](
                scores_tP,
                scale,
                largest.logit_b.contiguous(),
                largest.share_b.contiguous(),
                gradient_t.contiguous(),
                out_tP,
                num_columns,
                scores_tP.stride(0),
                out_tP.stride(0),
                HALF_FLOOR=FLOOR / 2,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
    return out_tP


def plain_row_largest(scores_tP: Tensor, scale: Tensor) -> Largest:
    """Return what `row_largest` does, of any floating type and on any device."""
    if not scores_tP.shape[1]:
        return _without_columns(scores_tP, scale)
    logits_tP = scores_tP * scale
    return Largest(logits_tP.amax(1), torch.softmax(logits_tP, 1).amax(1))


def plain_soft_max_gradient(scores_tP: Tensor, scale: Tensor, largest: Largest, gradient_t: Tensor, out_tP: Tensor) -> Tensor:
    """Do what `soft_max_gradient` does, of any floating type and on any device."""
    has_none_t1 = (largest.logit_b <= FLOOR / 2 * scale)[:, None]
    factor_t1 = (gradient_t * largest.share_b)[:, None]
    weight_tP = torch.exp(scores_tP * scale - largest.logit_b[:, None])
    return out_tP.copy_(torch.where(has_none_t1, 0, weight_tP * factor_t1))


@functools.cache
def _launches(device: torch.device) -> bool:
    """Return whether a kernel runs here; Triton builds its launcher by the machine's C compiler, which may be missing."""
    try:
        row_largest(torch.zeros(1, 1, device=device), torch.ones((), device=device))
    except Exception as error:  # of many types, none of them ours
        log.warning("Triton does not work on %s (%s); the loss runs in plain torch, slower", device, error)
        return False
    return True


def _without_columns(scores_t0: Tensor, scale: Tensor) -> Largest:
    return Largest((FLOOR * scale).to(scores_t0.dtype).repeat(len(scores_t0)), scores_t0.new_ones(len(scores_t0)))


def _has_dense_columns(values_tP: Tensor) -> bool:
    return values_tP.stride(1) == 1 or values_tP.shape[1] == 1
