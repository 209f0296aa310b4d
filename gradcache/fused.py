"""The log-sum-exp of each row of a tile and its gradient: one pass over the scores each, by Triton where there is a GPU.

They serve objectives whose statistic of a row is the log-sum-exp of `scale * score` over the columns. Masked scores hold
FLOOR, so that they weigh nothing; a row of nothing else has a log-sum-exp near FLOOR * scale, by which the gradient knows
that it has no negatives. That holds for a scale of 1e-3 and more. Nothing here waits for the device.

The plain versions are the reference and run anywhere; they hold one or two more tiles of scores.
Proven so far: the kernels' arithmetic under Triton's interpreter on a CPU, which finds no races, and that they compile for
NVIDIA's architectures 8.0 and 9.0. Not yet run or timed on a GPU.
"""

import functools
import logging
import os

import torch
from torch import Tensor

from gradcache.objectives.tile import FLOOR

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


def row_log_sum_exp(scores_tP: Tensor, scale: Tensor) -> Tensor:
    """Return logsumexp(scale * scores, 1), (t,) float32; of no columns FLOOR * scale.

    scores_tP: float32, finite; rows may be strided, columns not. Where the number of columns and the row stride are
    multiples of 16, a thread loads 16 bytes at once.
    scale: scalar float32 on the same device, more than 0.
    """
    num_rows, num_columns = scores_tP.shape
    if not num_columns:
        return _without_columns(scores_tP, scale)
    log_sum_t = scores_tP.new_empty(num_rows)
    if num_rows:
        from gradcache.kernels import row_log_sum_exp_kernel

        assert scores_tP.dtype == scale.dtype == torch.float32 and _has_dense_columns(scores_tP)
        with torch.cuda.device_of(scores_tP):  # Triton launches on the current device
            row_log_sum_exp_kernel[(num_rows,)](
                scores_tP, scale, log_sum_t, num_columns, scores_tP.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return log_sum_t


def soft_max_gradient(scores_tP: Tensor, scale: Tensor, log_sum_t: Tensor, gradient_t: Tensor, out_tP: Tensor) -> Tensor:
    """Fill out_tP with gradient_t * exp(scale * score - log_sum_t), and return it; zero for rows without negatives.

    scores_tP, scale: as in `row_log_sum_exp`.
    log_sum_t: (t,) float32, of these scores or of more columns; up to FLOOR / 2 * scale the row has no negatives.
    gradient_t: (t,) float32, of the loss with respect to log_sum_t. Leave a weight of 1 / rows out where out_tP is float16,
    which holds no number below 6e-8.
    out_tP: bfloat16, float16 or float32; rows may be strided, columns not; it may be scores_tP itself.
    """
    num_rows, num_columns = scores_tP.shape
    if num_rows and num_columns:
        from gradcache.kernels import soft_max_gradient_kernel

        assert scores_tP.dtype == scale.dtype == log_sum_t.dtype == gradient_t.dtype == torch.float32
        assert _has_dense_columns(scores_tP) and _has_dense_columns(out_tP)
        with torch.cuda.device_of(scores_tP):
            # Blocks are independent here, so that few rows keep a GPU busy, too.
            soft_max_gradient_kernel[(num_rows * -(-num_columns // BLOCK),)](
                scores_tP,
                scale,
                log_sum_t.contiguous(),
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


def plain_row_log_sum_exp(scores_tP: Tensor, scale: Tensor) -> Tensor:
    """Return what `row_log_sum_exp` does, of any floating type and on any device."""
    if not scores_tP.shape[1]:
        return _without_columns(scores_tP, scale)
    return torch.logsumexp(scores_tP * scale, 1)


def plain_soft_max_gradient(scores_tP: Tensor, scale: Tensor, log_sum_t: Tensor, gradient_t: Tensor, out_tP: Tensor) -> Tensor:
    """Do what `soft_max_gradient` does, of any floating type and on any device."""
    has_none_t = log_sum_t <= FLOOR / 2 * scale
    log_sum_t1 = log_sum_t.masked_fill(has_none_t, torch.inf)[:, None]  # each weight is exactly zero then
    gradient_t1 = gradient_t.masked_fill(has_none_t, 0)[:, None]
    weight_tP = torch.mul(scores_tP, scale, out=out_tP if out_tP.dtype == scores_tP.dtype else None)
    weight_tP.sub_(log_sum_t1).exp_().mul_(gradient_t1)
    return out_tP if weight_tP is out_tP else out_tP.copy_(weight_tP)


@functools.cache
def _launches(device: torch.device) -> bool:
    """Return whether a kernel runs here; Triton builds its launcher by the machine's C compiler, which may be missing."""
    try:
        row_log_sum_exp(torch.zeros(1, 1, device=device), torch.ones((), device=device))
    except Exception as error:  # of many types, none of them ours
        log.warning("Triton does not work on %s (%s); the loss runs in plain torch, slower", device, error)
        return False
    return True


def _without_columns(scores_t0: Tensor, scale: Tensor) -> Tensor:
    return (FLOOR * scale).to(scores_t0.dtype).repeat(len(scores_t0))


def _has_dense_columns(values_tP: Tensor) -> bool:
    return values_tP.stride(1) == 1 or values_tP.shape[1] == 1
