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
class FalseNegatives:
    """Columns that score so high that they are taken for positives nobody has judged: they are no negatives of their row.

    Each limit is on the raw score; s_pos is that of the row's own positive. With several limits the lowest decides.
    Source: Moreira et al. 2024 (NV-Retriever), arXiv 2407.15831, of mined negatives; Gu et al. 2025 (UniME), arXiv 2504.17432, of
    those in the batch.
    """

    max_score: float | None = None  # keep s <= max_score
    absolute_margin: float | None = None  # keep s <= s_pos - margin; a negative one lets scores up to so much above pass
    relative_margin: float | None = None  # keep s <= s_pos - |s_pos| * margin

    def thresholds(self, positive_R: Tensor) -> Tensor:
        """Return the score of each row above which a column is dropped, (R,)."""
        limits = []
        if self.max_score is not None:
            limits.append(torch.full_like(positive_R, self.max_score))
        if self.absolute_margin is not None:
            limits.append(positive_R - self.absolute_margin)
        if self.relative_margin is not None:
            limits.append(positive_R - positive_R.abs() * self.relative_margin)
        return torch.stack(limits).amin(0)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """How scores become a loss."""

    objective: Objective = field(default_factory=InfoNCE)
    symmetric: bool = False  # the mean of both directions, queries -> passages and target passages -> queries
    partition: Literal["each", "joint"] = "each"  # joint: both directions of a query are one row, with one denominator (GTE)
    false_negatives: FalseNegatives | None = None
    same_side: bool = False  # the rows of a direction's own side are negatives, too: query-query and passage-passage
    gather: Literal["auto", "passages", "queries"] = "auto"  # what travels to the other ranks
    keep_scores_gib: float | None = None  # scores kept for the gradient where two phases need them; None: a share of what is free
    tile_rows: int | None = None  # rows of scores evaluated at once; None: as many as fit a fixed memory
    product_dtype: torch.dtype | None = None  # embeddings are gathered and multiplied in; None: in what the encoder returns
    widths: tuple[int, ...] | None = None  # falling: the mean over embeddings cut to so many components; None: as they are
    width_weights: tuple[float, ...] | None = None  # of that mean; None: equal ones
    outputs: dict[str, float] | None = None  # weights of the named outputs that have this loss; None: the first one
    text_terms: Sequence[TextTerm] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for options that have no meaning together."""
        name = type(self.objective).__name__
        if self.partition == "joint" and not (self.symmetric and self.objective.joins):
            raise ValueError(
                f'partition="joint" puts both directions into one denominator; expected symmetric=True and an objective that '
                f"takes them so, found symmetric={self.symmetric} and {name}"
            )
        if self.symmetric and self.objective.has_pair_scores:
            raise ValueError(f"{name} scores a pair in one direction only; expected symmetric=False")
