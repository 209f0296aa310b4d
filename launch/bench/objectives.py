"""`negpool bench objectives`: what each published loss takes in the place of InfoNCE, products and gradients included.

All have their turn on the same random unit rows, one process has all columns. What a loss takes beyond InfoNCE are passes over
the tiles of scores, numbers of each row, and in a few a second sweep.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from gradcache import OBJECTIVES, FalseNegatives, InfoNCE, find_objective
from gradcache.objectives import Objective
from launch.bench.machine import describe
from launch.bench.stage import make_stage
from launch.bench.turns import compared, take_turns
from trainer.encoder.encode import DTYPES
from trainer.world import stay_alone

ROWS, COLUMNS = {"cpu": 4096, "cuda": 32768}, {"cpu": 16384, "cuda": 65536}
WIDTH = {"cpu": 384, "cuda": 768}
BASE = "info_nce"
WANTED = 1.25  # of InfoNCE's time, of the common ones
COMMON = ("masks", "hardness=9", "focal=0.5", "margin=0.1", "dcl", "dclw")
MASKS: dict[str, Any] = {"false_negatives": FalseNegatives(absolute_margin=-0.1)}
# By name: what changes InfoNCE, and options of the loss.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    BASE: ({}, {}),
    "masks": ({}, MASKS),
    "hardness=9": ({"hardness": 9}, {}),
    "hardness=9, mean_weight=true": ({"hardness": 9, "mean_weight": True}, {}),
    "hardest=8": ({"hardest": 8}, {}),
    "hardest=8 and masks": ({"hardest": 8}, MASKS),
    "focal=0.5": ({"focal": 0.5}, {}),
    "margin=0.1": ({"margin": 0.1}, {}),
    'positives="mean"': ({"positives": "mean"}, {}),
}


def bench_objectives(rounds: int, half: bool | None) -> dict[str, Any]:
    """Return the time of each objective over InfoNCE's; half: bfloat16 embeddings and products, None: on a GPU."""
    world = stay_alone(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
    kind = world.device.type
    precision = "bf16" if (kind == "cuda" if half is None else half) else "fp32"
    stage = make_stage(ROWS[kind], COLUMNS[kind], WIDTH[kind], DTYPES[precision], world.device)
    ways = {
        name: functools.partial(stage.loss, InfoNCE(**parameters), **options) for name, (parameters, options) in VARIANTS.items()
    }
    others = {name: find_objective(name, {}) for name in OBJECTIVES if name != BASE}
    for name, objective in others.items():
        if objective.sees_columns:
            ways[name] = functools.partial(stage.loss, _on(objective, world.device), **_options(objective))
    # What sees the row's own side, or both directions, has twice the scores.
    both: Mapping[str, dict[str, Any]] = {
        "symmetric": {"symmetric": True},
        "symmetric and same_side": {"symmetric": True, "same_side": True},
        'the same with partition="joint"': {"symmetric": True, "same_side": True, "partition": "joint"},
    }
    ways |= {name: functools.partial(stage.loss, InfoNCE(), **options) for name, options in both.items()}
    found = compared(take_turns(ways, rounds, world), BASE, dict.fromkeys(COMMON, WANTED))
    sizes = {"num_rows": ROWS[kind], "num_columns": COLUMNS[kind], "width": WIDTH[kind]}
    return {**describe(world.device), **sizes, "precision": precision, "rounds": rounds, "objectives": found}


def _on(objective: Objective, device: torch.device) -> Objective:
    return objective.to(device) if isinstance(objective, torch.nn.Module) else objective


def _options(objective: Objective) -> dict[str, Any]:
    return {"same_side": True} if objective.needs_same_side else {}
