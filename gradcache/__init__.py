"""Contrastive losses over very large batches: exact gradients at the memory of one chunk, on one process or on many.

Tensors, modules and process groups only: no text, no Hugging Face, no files.
"""

from gradcache.batch import Batch, Tower
from gradcache.chunks import plan_chunks
from gradcache.objectives import OBJECTIVES, Objective, Tile
from gradcache.reference import reference_step
from gradcache.step import StepResult, cached_step
from gradcache.sync import DDPSync, GradientSync, NoSync
from gradcache.temperature import Temperature

__all__ = [
    "OBJECTIVES",
    "Batch",
    "DDPSync",
    "GradientSync",
    "NoSync",
    "Objective",
    "StepResult",
    "Temperature",
    "Tile",
    "Tower",
    "cached_step",
    "plan_chunks",
    "reference_step",
]
