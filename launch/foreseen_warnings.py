"""What in a job, or in its plan on this machine, will not go well: sentences, each with the setting that changes it."""

import shutil
from pathlib import Path
from typing import Any

import psutil

from launch.counted import counted
from launch.jobfile import Jobs
from launch.shares import Shares
from mining.table.doubts import mining_defeats
from trainer.data.datasets import RetrievalData
from trainer.data.split import split_command
from trainer.own_numbers import defeats, planned_steps

GIB = 2**30


def warnings_of_job(jobs: Jobs, data: RetrievalData, mines: bool = True) -> list[str]:
    """Return what a job's own numbers defeat, on both sides, in sentences; each side says it again for its status."""
    num_queries, num_passages = len(data.training_queries(jobs.train.data.train_split)), len(data.corpus)
    num_steps = planned_steps(jobs.train, num_queries)
    of_trainer = {} if num_steps is None else defeats(jobs.train, num_steps, num_passages)
    of_miner = mining_defeats(jobs.mine, num_passages) if mines else {}
    found = [sentence for sentence in (*of_trainer.values(), *of_miner.values()) if sentence is not None]
    return [*_of_evaluation(jobs, data), *found]


def _of_evaluation(jobs: Jobs, data: RetrievalData) -> list[str]:
    split, settings = jobs.train.eval.split, jobs.train.data
    if split in data.qrels:
        return []
    command = split_command(None if jobs.train.sources else settings.path, settings.columns)
    return [f"no {split} queries: nothing will tell whether the model is better; {command} sets some aside"]


def warnings_of_plan(found: dict[str, Any], shares: Shares, draws_negatives: bool, length: str = "optim.epochs") -> list[str]:
    """Return the sentences; draws_negatives: whether steps draw from what is mined. length: the setting of the run's length."""
    return [*_of_negatives(found, draws_negatives, length), *_of_memory(found, shares), *_of_disk(found)]


def _of_negatives(found: dict[str, Any], draws_negatives: bool, length: str) -> list[str]:
    times, num_steps = found["time"], found["steps"]["steps"]
    if not draws_negatives or times["swaps"]:
        return []
    refresh = max(1, round(times["refresh_s"] / times["step_s"]))
    return [
        f"no mined negatives come into force before the end: a refresh takes as long as some {counted(refresh, 'step')}, "
        f"and the run has {num_steps:,}; set {length} higher, or model.max_passage_tokens lower"
    ]


def _of_memory(found: dict[str, Any], shares: Shares) -> list[str]:
    of_trainers = sum(found["memory"]["trainer"].values())
    if shares.train_gpus:
        import torch  # which is there by then, as the plan has asked it for the GPUs

        has = torch.cuda.get_device_properties(0).total_memory / GIB
        needs, where, lower = of_trainers, "a trainer's GPU", "chunk.tokens"
    else:
        has = psutil.virtual_memory().available / GIB
        needs = of_trainers * shares.train_ranks + found["memory"]["miner"]["total_gib"] * shares.mine_ranks
        where, lower = "this machine", "launch.train_ranks or chunk.tokens"
    return [f"some {needs:.1f} GiB are needed, and {where} has {has:.1f} GiB; set {lower} lower"] if needs > has else []


def _of_disk(found: dict[str, Any]) -> list[str]:
    folder = Path(found["run"]).absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free / GIB
    if found["disk_gib"] <= free:
        return []
    return [
        f"up to {found['disk_gib']:.1f} GiB are kept in {found['run']}, and the disk has {free:.1f} GiB free; set "
        "checkpoint.keep or mine.keep_encodings lower, or run.folder"
    ]
