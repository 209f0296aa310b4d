"""Losses under their names in job files, and where each comes from."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gradcache.objectives.adaptive import PairTemperature
from gradcache.objectives.attraction import CACR
from gradcache.objectives.debiased import Debiased
from gradcache.objectives.decoupled import DCL, DCLW
from gradcache.objectives.info_nce import InfoNCE
from gradcache.objectives.margins import AdaptiveMargins
from gradcache.objectives.ordered import AnglE, Correlation, CoSENT
from gradcache.objectives.parameters import Parameter, Range, load, make_objective, parameters_of
from gradcache.objectives.progressive import Progressive
from gradcache.objectives.sigmoid import Sigmoid
from gradcache.objectives.smoothed import LabelSmoothing
from gradcache.objectives.sorting import GroCo
from gradcache.objectives.symile import symile_rows
from gradcache.objectives.tile import Objective, Rows, Tile
from gradcache.objectives.uniformity import AlignmentUniformity


@dataclass(frozen=True)
class Named:
    """An objective that a job file can name."""

    make: Callable[..., Objective]
    source: str
    cost: float | None = None  # of InfoNCE's time, see docs/objectives.md; None: it looks at no tile of scores


OBJECTIVES: dict[str, Named] = {
    "info_nce": Named(InfoNCE, "van den Oord et al. 2018, arXiv 1807.03748", 1.0),
    "dcl": Named(DCL, "Yeh et al. 2022, arXiv 2110.06848", 1.01),
    "dclw": Named(DCLW, "Yeh et al. 2022, arXiv 2110.06848", 0.96),
    "debiased": Named(Debiased, "Chuang et al. 2020, arXiv 2007.00224", 1.06),
    "label_smoothing": Named(LabelSmoothing, "Jia et al. 2021 (ALIGN), arXiv 2102.05918", 1.33),
    "progressive": Named(Progressive, "Wu et al. 2023 (PEG), arXiv 2311.11691", 1.0),
    "pair_temperature": Named(PairTemperature, "Wang et al. 2024 (AMCL), arXiv 2310.05615", 1.85),
    "cacr": Named(CACR, "Zheng et al. 2021, arXiv 2105.03746", 1.44),
    "groco": Named(GroCo, "Shvetsova et al. 2023, arXiv 2301.02009", 1.54),
    "adaptive_margins": Named(AdaptiveMargins, "Gienapp et al. 2024 (ARM), arXiv 2407.21515", 1.98),
    "sigmoid": Named(Sigmoid, "Zhai et al. 2023 (SigLIP), arXiv 2303.15343", 1.18),
    "alignment_uniformity": Named(AlignmentUniformity, "Wang and Isola 2020, arXiv 2005.10242", 1.88),
    "cosent": Named(CoSENT, "Su 2022, kexue.fm/archives/8847"),
    "angle": Named(AnglE, "Li and Li 2023, arXiv 2309.12871"),
    "correlation": Named(Correlation, "CoDiEmb 2025, arXiv 2508.11442"),
}


def find_objective(name: str, parameters: Mapping[str, Any]) -> Objective:
    """Return the objective of a name, or of `module:name`. Raises ValueError, in words for a person, where there is none."""
    if ":" in name:
        return make_objective(load(name), name, parameters)
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, 1)
        words = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(OBJECTIVES)}, or module:name"
        raise ValueError(f"there is no objective {name!r}; {words}")
    return make_objective(OBJECTIVES[name].make, name, parameters)


__all__ = [
    "CACR",
    "DCL",
    "DCLW",
    "OBJECTIVES",
    "AdaptiveMargins",
    "AlignmentUniformity",
    "AnglE",
    "CoSENT",
    "Correlation",
    "Debiased",
    "GroCo",
    "InfoNCE",
    "LabelSmoothing",
    "Objective",
    "PairTemperature",
    "Parameter",
    "Progressive",
    "Range",
    "Rows",
    "Sigmoid",
    "Tile",
    "find_objective",
    "parameters_of",
    "symile_rows",
]
