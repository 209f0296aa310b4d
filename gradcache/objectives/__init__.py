"""Losses under their names in job files."""

from gradcache.objectives.info_nce import InfoNCE, MultiPositiveInfoNCE
from gradcache.objectives.tile import Objective, Rows, Tile

OBJECTIVES: dict[str, Objective] = {"info_nce": InfoNCE(), "info_nce_multi": MultiPositiveInfoNCE()}

__all__ = ["OBJECTIVES", "InfoNCE", "MultiPositiveInfoNCE", "Objective", "Rows", "Tile"]
