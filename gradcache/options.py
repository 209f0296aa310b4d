"""How scores become a loss: all settings that the mathematics reads, in one object."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gradcache.objectives import InfoNCE, Objective

# n rows, D width


@dataclass(frozen=True, kw_only=True)
class TextTerm:
    """A term of the loss that sees one text alone, such as a distance to a teacher's vector: the mean over all ranks' rows."""

    function: Callable[[Tensor, Tensor], Tensor]  # embeddings (n, D), all outputs side by side, and keys (n,) -> (n,) losses
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """How scores become a loss."""

    objective: Objective = field(default=InfoNCE())
    symmetric: bool = False  # the mean of both directions, queries -> passages and target passages -> queries
    same_side: bool = False  # the rows of a direction's own side are negatives, too: query-query and passage-passage
    gather: Literal["auto", "passages", "queries"] = "auto"  # what travels to the other ranks
    keep_scores_gib: float | None = None  # scores kept for the gradient where two phases need them; None: a share of what is free
    tile_rows: int | None = None  # rows of scores evaluated at once; None: as many as fit a fixed memory
    product_dtype: torch.dtype | None = None  # embeddings are gathered and multiplied in; None: in what the encoder returns
    widths: tuple[int, ...] | None = None  # falling: the mean over embeddings cut to so many components; None: as they are
    width_weights: tuple[float, ...] | None = None  # of that mean; None: equal ones
    outputs: dict[str, float] | None = None  # weights of the named outputs that have this loss; None: the first one
    text_terms: Sequence[TextTerm] = ()
