"""Matrix products of embeddings and scores: of any floating type, with sums of at least float32."""

import torch
from torch import Tensor

COLUMNS_AT_ONCE = 16384  # whose gradient in half precision is made beside the sum


def for_products(values: Tensor) -> Tensor:
    """Return values as the device multiplies them: a CPU has no fast product of half precision with float32 sums."""
    if values.device.type == "cuda" and values.dtype in (torch.bfloat16, torch.float16):
        return values
    return values.to(torch.promote_types(values.dtype, torch.float32))


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left @ right with float32 sums, also of half-precision values."""
    if left.dtype in (torch.float32, torch.float64):
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def add_product(total_PD: Tensor, left_Pt: Tensor, right_tD: Tensor) -> None:
    """Add a product to a sum, without a temporary of its size."""
    if left_Pt.dtype == total_PD.dtype:
        total_PD.addmm_(left_Pt, right_tD)
        return
    for total, left in zip(total_PD.split(COLUMNS_AT_ONCE), left_Pt.split(COLUMNS_AT_ONCE), strict=True):
        total += product(left, right_tD)
