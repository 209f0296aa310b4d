"""The log-sum-exp of rows and its gradient as Triton kernels.

`fused.py` imports this file at the first launch, for it imports Triton, which not every machine has. Each kernel reads the
scores once and takes one exponential a score, so it is bound by memory.
"""

import triton
import triton.language as tl


@triton.jit
def row_log_sum_exp_kernel(score_ptr, scale_ptr, log_sum_ptr, num_columns, row_stride, BLOCK: tl.constexpr):
    """Write the log-sum-exp of the scaled scores of row `program_id(0)`; num_columns: at least 1."""
    row = tl.program_id(0).to(tl.int64)  # a tile of 4,096 x 1,048,576 has more scores than an int32 counts
    scale = tl.load(scale_ptr)
    lanes = tl.arange(0, BLOCK)
    most = float("-inf")
    # One maximum for the row and one sum for each lane: a block costs one exponential a score and one exchange between
    # warps, that of its maximum. The lanes' sums are added up once, behind the loop.
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lanes
        is_column = columns < num_columns
        scores = tl.load(score_ptr + row * row_stride + columns, mask=is_column, other=0.0)
        logits = tl.where(is_column, scores * scale, float("-inf"))
        new_most = tl.maximum(most, tl.max(logits, 0))
        sums = sums * tl.exp(most - new_most) + tl.exp(logits - new_most)
        most = new_most
    tl.store(log_sum_ptr + row, most + tl.log(tl.sum(sums, 0)))


@triton.jit
def soft_max_gradient_kernel(
    score_ptr,
    scale_ptr,
    log_sum_ptr,
    gradient_ptr,
    out_ptr,
    num_columns,
    row_stride,
    out_row_stride,
    HALF_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of one block of columns of one row: blocks first, then rows."""
    num_blocks = tl.cdiv(num_columns, BLOCK)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    columns = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < num_columns
    scale = tl.load(scale_ptr)
    log_sum = tl.load(log_sum_ptr + row)
    scores = tl.load(score_ptr + row * row_stride + columns, mask=is_column, other=0.0)
    gradients = tl.load(gradient_ptr + row) * tl.exp(scores * scale - log_sum)
    # Written as <=, so that a log-sum-exp that is not a number gives gradients that are none either.
    gradients = tl.where(log_sum <= HALF_FLOOR * scale, 0.0, gradients)
    tl.store(out_ptr + row * out_row_stride + columns, gradients.to(out_ptr.dtype.element_ty), mask=is_column)
