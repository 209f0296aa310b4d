"""Contrastive losses over very large batches: exact gradients at the memory of one chunk, on one process or on many.

Tensors, modules and process groups only: no text, no Hugging Face, no files.
"""

from gradcache.agree import NotFinite
from gradcache.batch import Batch, Candidates, Extra, Tower
from gradcache.budget import Budget, probe_budget
from gradcache.cache import cached_encode
from gradcache.chunks import plan_chunks
from gradcache.contrastive import contrastive_loss
from gradcache.lost import LostRank
from gradcache.objectives import OBJECTIVES, InfoNCE, Objective, Range, Rows, Tile, find_objective, parameters_of
from gradcache.objectives.tile import LOG_SUM_EXP, MAXIMUM, SUM, Merge, top_k, weighted_mean
from gradcache.options import FalseNegatives, LossOptions, TextTerm
from gradcache.ragged import Ragged
from gradcache.reference import reference_step
from gradcache.step import StepResult, cached_step
from gradcache.sync import DDPSync, FSDP2Sync, GradientSync, NoSync
from gradcache.temperature import Temperature

__all__ = [
    "LOG_SUM_EXP",
    "MAXIMUM",
    "OBJECTIVES",
    "SUM",
    "Batch",
    "Budget",
    "Candidates",
    "DDPSync",
    "Extra",
    "FSDP2Sync",
    "FalseNegatives",
    "GradientSync",
    "InfoNCE",
    "LossOptions",
    "LostRank",
    "Merge",
    "NoSync",
    "NotFinite",
    "Objective",
    "Ragged",
    "Range",
    "Rows",
    "StepResult",
    "Temperature",
    "TextTerm",
    "Tile",
    "Tower",
    "cached_encode",
    "cached_step",
    "contrastive_loss",
    "find_objective",
    "parameters_of",
    "plan_chunks",
    "probe_budget",
    "reference_step",
    "top_k",
    "weighted_mean",
]
