"""What an objective sees: some rows of scores against all columns of the pool."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tile:
    """t rows of the score matrix, P columns.

    In `logits_tP` only the target and the negatives of a row count, each text once: the other positives and all copies
    are -inf. The other positives that the pool holds, the siblings, stand beside it, each text once.
    """

    logits_tP: Tensor  # scores times the inverse temperature, -inf where masked
    target_t: Tensor  # (t,) int64 column of each row's own positive
    sibling_rows: Tensor  # (s,) int64 row of the tile that each sibling belongs to
    sibling_logits: Tensor  # (s,) its score times the inverse temperature
