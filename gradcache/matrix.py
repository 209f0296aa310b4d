"""One matrix of scores: the rows and columns that make it, and the gradient that goes back to them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from gradcache.masks import Masks

# R rows, P columns, D width, E width of the second matrix


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Rows and columns whose scores become a loss, in one view."""

    row_RD: Tensor  # detached, of one floating type with the columns, which is that of the products
    column_PD: Tensor
    kind_P: Tensor  # int8
    masks: Masks
    scale: Tensor  # scalar in the type of the scores: float32, or float64 if the rows are
    positive_R: Tensor  # raw score of each row's own positive
    row_values: Mapping[str, Tensor] = field(default_factory=dict)
    second: tuple[Tensor, Tensor] | None = None  # rows (R, E) and columns (P, E) of the second matrix
    progress: float = 0.0
    threshold_R: Tensor | None = None  # raw score above which a column is no negative of its row
    trains_rows: bool = True
    num_trained_columns: int | None = None  # the first ones; None: all


@dataclass
class TileGradients:
    """The gradient of the statistics under their derivatives."""

    row_RD: Tensor | None
    column_PD: Tensor | None  # of the trained columns
    scale: Tensor  # scalar float64
    positive_R: Tensor | None
    parameters: list[Tensor]
