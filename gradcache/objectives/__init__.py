"""Losses of one tile, under their names in job files. Each takes a `Tile` and returns one loss a row, (t,) float32."""

from collections.abc import Callable

from torch import Tensor

from gradcache.objectives.info_nce import info_nce, info_nce_multi
from gradcache.objectives.tile import Tile

Objective = Callable[[Tile], Tensor]

OBJECTIVES: dict[str, Objective] = {"info_nce": info_nce, "info_nce_multi": info_nce_multi}

__all__ = ["OBJECTIVES", "Objective", "Tile", "info_nce", "info_nce_multi"]
