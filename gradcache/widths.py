"""Views of embeddings: an output of several, cut to its first components and made unit length again; and back for gradients.

A model trained at several widths can be cut after training: its first components are an embedding of their own. Gathered is the
whole embedding, once; each rank takes one view of what it has gathered at a time.
Source: Kusupati et al. 2022, Matryoshka Representation Learning, arXiv 2205.13147; unit length at every width as in its
section 4 on retrieval.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# n rows, D width, w width of a view, b rows of a block

BLOCK_ROWS = 8192  # carried back at once, so that it takes no further copy of all gradients
SHORTEST = 1e-12  # norm that a shorter row is divided by, as in torch.nn.functional.normalize


@dataclass(frozen=True)
class View:
    """Some components of the embeddings, which are one term of the loss."""

    first: int
    stop: int
    is_cut: bool  # then rows are made unit length again
    share: float  # of the loss; those of all views add up to 1


def plan_views(
    widths: Sequence[int] | None,
    weights: Sequence[float] | None,
    outputs: Mapping[str, int],
    output_weights: Mapping[str, float] | None,
) -> list[View]:
    """Return the terms of the loss, of each output the widest first; raises ValueError for what does not fit.

    outputs: widths by name, in their order. output_weights: of those that have a loss; None: the first one.
    """
    starts = dict(zip(outputs, itertools.accumulate(outputs.values(), initial=0), strict=False))
    chosen = {next(iter(outputs)): 1.0} if output_weights is None else output_weights
    if unknown := chosen.keys() - outputs.keys():
        raise ValueError(f"the loss is asked for output {unknown.pop()!r}, and the encoder returns {', '.join(outputs)}")
    if widths is not None:
        check_widths(widths, weights)
    views = []
    for name, output_weight in chosen.items():
        first, width, share = starts[name], outputs[name], output_weight / sum(chosen.values())
        if widths is None:
            views.append(View(first, first + width, False, share))
            continue
        if widths[0] > width:
            raise ValueError(f"widths begin with {widths[0]}, and embeddings have only {width} components")
        given = weights or [1.0] * len(widths)
        views += [View(first, first + w, True, share * g / sum(given)) for w, g in zip(widths, given, strict=True)]
    return views


def check_widths(widths: Sequence[int], weights: Sequence[float] | None) -> None:
    """Raise ValueError where widths do not fall, or weights do not fit them."""
    if not widths or widths[-1] < 1 or any(wide <= narrow for wide, narrow in itertools.pairwise(widths)):
        raise ValueError(f"widths are {list(widths)}; expected one or more that fall, each at least 1, as in [384, 192, 96]")
    if weights is not None and (len(weights) != len(widths) or any(not weight > 0 for weight in weights)):
        raise ValueError(f"width_weights are {list(weights)}; expected one above 0 for each of the widths {list(widths)}")


@dataclass(frozen=True)
class ViewedRows:
    """Rows in one view."""

    rows_nw: Tensor  # unit length if the view is cut
    norm_n1: Tensor | None  # before; None where rows are left as they are

    def whole(self, gradient_nw: Tensor) -> Tensor:
        """Turn the gradient of the viewed rows, in place, into that of the components they were cut from; return it."""
        if self.norm_n1 is None:
            return gradient_nw
        for unit_bw, norm_b1, gradient_bw in zip(
            self.rows_nw.split(BLOCK_ROWS), self.norm_n1.split(BLOCK_ROWS), gradient_nw.split(BLOCK_ROWS), strict=True
        ):
            unit_bw = unit_bw.to(gradient_bw.dtype)
            # What would only lengthen a row changes nothing.
            gradient_bw.sub_(unit_bw * (unit_bw * gradient_bw).sum(1, keepdim=True)).div_(norm_b1)
        return gradient_nw


def view_rows(parts: Sequence[Tensor], view: View) -> ViewedRows:
    """Return the rows of all parts, one behind the other, in a view; holds one copy of it, or none of whole rows of one part."""
    sliced = [rows_nD[:, view.first : view.stop] for rows_nD in parts]
    if not view.is_cut:
        return ViewedRows(sliced[0].contiguous() if len(sliced) == 1 else torch.cat(sliced), None)
    rows_nw = torch.cat(sliced)
    wide = torch.promote_types(rows_nw.dtype, torch.float32)
    norm_n1 = torch.linalg.vector_norm(rows_nw, dim=1, keepdim=True, dtype=wide).clamp_min_(SHORTEST)
    return ViewedRows(rows_nw.div_(norm_n1), norm_n1)
