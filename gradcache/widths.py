"""Embeddings at several widths: cut to their first components and made unit length again, and the way back for gradients.

A model trained so can be cut after training: its first components are an embedding of their own. Gathered is the whole
embedding, once; each rank cuts what it has gathered, one width at a time.
Source: Kusupati et al. 2022, Matryoshka Representation Learning, arXiv 2205.13147; unit length at every width as in its
section 4 on retrieval.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# n rows, D width, w width of a cut, b rows of a block

BLOCK_ROWS = 8192  # carried back at once, so that it takes no further copy of all gradients
SHORTEST = 1e-12  # norm that a shorter row is divided by, as in torch.nn.functional.normalize


@dataclass(frozen=True)
class Cut:
    """One term of the loss."""

    width: int | None  # None: the embeddings as they are
    share: float  # of the loss; those of all cuts add up to 1


def plan_cuts(widths: Sequence[int] | None, weights: Sequence[float] | None, embedding_width: int) -> list[Cut]:
    """Return the terms of the loss, the widest first; raises ValueError for widths that do not fit."""
    if widths is None:
        return [Cut(None, 1.0)]
    check_widths(widths, weights)
    if widths[0] > embedding_width:
        raise ValueError(f"widths begin with {widths[0]}, and embeddings have only {embedding_width} components")
    weights = weights or [1.0] * len(widths)
    return [Cut(width, weight / sum(weights)) for width, weight in zip(widths, weights, strict=True)]


def check_widths(widths: Sequence[int], weights: Sequence[float] | None) -> None:
    """Raise ValueError where widths do not fall, or weights do not fit them."""
    if not widths or widths[-1] < 1 or any(wide <= narrow for wide, narrow in itertools.pairwise(widths)):
        raise ValueError(f"widths are {list(widths)}; expected one or more that fall, each at least 1, as in [384, 192, 96]")
    if weights is not None and (len(weights) != len(widths) or any(not weight > 0 for weight in weights)):
        raise ValueError(f"width_weights are {list(weights)}; expected one above 0 for each of the widths {list(widths)}")


@dataclass(frozen=True)
class CutRows:
    """Rows at one width."""

    unit_nw: Tensor
    norm_n1: Tensor | None  # before; None where rows are left as they are

    def whole(self, gradient_nw: Tensor) -> Tensor:
        """Turn the gradient of the unit rows, in place, into that of the components they were cut from; return it."""
        if self.norm_n1 is None:
            return gradient_nw
        for unit_bw, norm_b1, gradient_bw in zip(
            self.unit_nw.split(BLOCK_ROWS), self.norm_n1.split(BLOCK_ROWS), gradient_nw.split(BLOCK_ROWS), strict=True
        ):
            unit_bw = unit_bw.to(gradient_bw.dtype)
            # What would only lengthen a row changes nothing.
            gradient_bw.sub_(unit_bw * (unit_bw * gradient_bw).sum(1, keepdim=True)).div_(norm_b1)
        return gradient_nw


def cut_rows(parts: Sequence[Tensor], width: int | None) -> CutRows:
    """Return the rows of all parts, one behind the other, cut to a width; holds one copy of the cut."""
    if width is None:
        return CutRows(parts[0] if len(parts) == 1 else torch.cat(list(parts)), None)
    unit_nw = torch.cat([rows_nD[:, :width] for rows_nD in parts])
    wide = torch.promote_types(unit_nw.dtype, torch.float32)
    norm_n1 = torch.linalg.vector_norm(unit_nw, dim=1, keepdim=True, dtype=wide).clamp_min_(SHORTEST)
    return CutRows(unit_nw.div_(norm_n1), norm_n1)


def add_first(total_nD: Tensor | None, gradient_nw: Tensor, width: int) -> Tensor:
    """Return the sum of a gradient and one of the first components, in the memory of one of them."""
    if total_nD is None:
        if gradient_nw.shape[1] == width:
            return gradient_nw
        total_nD = gradient_nw.new_zeros(len(gradient_nw), width)
    total_nD[:, : gradient_nw.shape[1]] += gradient_nw
    return total_nD
