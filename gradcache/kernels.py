"""The largest soft-max weight of rows, and the gradient of their log-sum-exp, as Triton kernels.

`fused.py` imports this file at the first launch, for it imports Triton, which not every machine has. Each kernel reads the
scores once and takes one exponential a score, so it is bound by memory.
"""

import triton
import triton.language as tl


@triton.jit
def row_largest_kernel(score_ptr, scale_ptr, logit_ptr, share_ptr, num_columns, row_stride, BLOCK: tl.constexpr):
    """Write the largest scaled score of row `program_id(0)`, and its share of the soft-max; num_columns: at least 1."""
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
    tl.store(logit_ptr + row, most)
    tl.store(share_ptr + row, 1.0 / tl.sum(sums, 0))


@triton.jit
def soft_max_gradient_kernel(
    score_ptr,
    scale_ptr,
    logit_ptr,
    share_ptr,
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
    largest = tl.load(logit_ptr + row)
    factor = tl.load(gradient_ptr + row) * tl.load(share_ptr + row)
    scores = tl.load(score_ptr + row * row_stride + columns, mask=is_column, other=0.0)
    # Written as <=, so that a logit that is not a number gives gradients that are none either.
    gradients = tl.where(largest <= HALF_FLOOR * scale, 0.0, factor * tl.exp(scores * scale - largest))
    tl.store(out_ptr + row * out_row_stride + columns, gradients.to(out_ptr.dtype.element_ty), mask=is_column)
