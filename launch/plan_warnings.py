"""What in the plan of a run will not go well on this machine, in sentences, each with the setting that changes it."""

import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from launch.plan import Plan

GIB = 2**30


def warnings_of_plan(found: dict[str, Any], shares: Plan, draws_negatives: bool) -> list[str]:
    """Return the sentences; draws_negatives: whether steps draw from what is mined."""
    return [*_of_negatives(found, draws_negatives), *_of_memory(found, shares), *_of_disk(found)]


def _of_negatives(found: dict[str, Any], draws_negatives: bool) -> list[str]:
    times, num_steps = found["time"], found["steps"]["steps"]
    if not draws_negatives or times["swaps"]:
        return []
    refresh = round(times["refresh_s"] / times["step_s"])
    return [
        f"No mined negatives come into force before the end: a refresh takes about as long as {refresh} of the {num_steps} "
        "steps; set optim.epochs higher, or model.max_passage_tokens lower."
    ]


def _of_memory(found: dict[str, Any], shares: Plan) -> list[str]:
    of_trainers = sum(found["memory"]["trainer"].values())
    if shares.train_gpus:
        has = torch.cuda.get_device_properties(0).total_memory / GIB
        needs, where, lower = of_trainers, "a trainer's GPU", "chunk.tokens"
    else:
        has = psutil.virtual_memory().available / GIB
        needs = of_trainers * shares.train_ranks + found["memory"]["miner"]["total_gib"] * shares.mine_ranks
        where, lower = "this machine", "launch.train_ranks or chunk.tokens"
    return [f"Some {needs:.1f} GiB are needed, and {where} has {has:.1f} GiB; set {lower} lower."] if needs > has else []


def _of_disk(found: dict[str, Any]) -> list[str]:
    folder = Path(found["run"]).absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free / GIB
    if found["disk_gib"] <= free:
        return []
    return [
        f"Up to {found['disk_gib']:.1f} GiB are kept in {found['run']}, and the disk has {free:.1f} GiB free; set "
        "checkpoint.keep or mine.keep_encodings lower, or run.folder."
    ]
