"""A run whose miner and an evaluation encode the same checkpoints at the same moment ends as one that nobody disturbed."""

import os
import time
from collections import Counter
from pathlib import Path

import torch

from tests.ranks import run_ranks
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.shards import Shards
from trainer.evaluate import evaluate
from trainer.handoff.weights import checkpoint_name, checkpoints_folder, open_checkpoint
from trainer.world import World

STEPS, EVERY = 6, 2
SCHEDULE = [{"step": 1, "checkpoint": 0}, {"step": 4, "checkpoint": 2}]
NUM_PASSAGES = 2 * 128  # and some more: three shards


def in_lockstep(log: Path, others: int) -> None:
    """Have each shard that is embedded noted, and the first of the passages wait until others begin on the same passages."""
    plain = Shards.embed

    def embed(self, shard, *rest):
        with open(log, "a") as file:
            file.write(f"{self.folder.name} {shard} {os.getpid()}\n")
        while self.num_rows > NUM_PASSAGES and others >= len(set(_who(log, self.folder.name))):
            time.sleep(0.01)
        return plain(self, shard, *rest)

    Shards.embed = embed


def _who(log: Path, folder: str) -> list[str]:
    return [line.split()[2] for line in log.read_text().splitlines() if line.startswith(folder)]


def take_part(rank: int, root: Path, name: str, is_disturbed: bool) -> None:
    """Train as rank 0, mine as rank 1, and evaluate each checkpoint that is mined as rank 2."""
    run, here = root / name, World(0, 1, torch.device("cpu"), None, None, accelerator=None)  # type: ignore[arg-type]
    in_lockstep(root / f"{name}.log", int(is_disturbed))
    shared = {"run": {"folder": run, "trackers": ()}, "data": {"path": root / "data", "cache": root / "cache"}}
    shared["negatives"] = {"schedule": SCHEDULE, "first_wait_s": 60}
    if rank == 0:
        from trainer.job import TrainJob
        from trainer.train import train

        steps = {"optim": {"steps": STEPS, "lr": 1e-3}, "checkpoint": {"every_steps": EVERY}, "batch": {"queries": 8}}
        model = {"model": {"name": str(root / "encoder")}, "eval": {"split": "none"}}
        train(_job(TrainJob, shared | steps | model), here)
    elif rank == 1:
        from mpi4py import MPI

        from mining.job import MineJob
        from mining.service import run_service

        mine = {"mine": {"poll_s": 0.1, "bm25_top_k": 20}, "search": {"top_k": 20}, "sample": {"num_negatives": 5}}
        run_service(_job(MineJob, shared | mine), MPI.COMM_SELF)
    else:
        data = open_dataset(root / "data", root / "cache")
        for entry in SCHEDULE:
            folder = checkpoints_folder(run) / checkpoint_name(entry["checkpoint"])
            while not (folder / "manifest.json").exists():
                time.sleep(0.01)
            loaded = load_encoder(ModelSettings(name=str(open_checkpoint(folder).encoder_folder)))
            evaluate(here, data, "test", *loaded, run / "shards")


def _job(kind, sections):
    from pydantic import TypeAdapter

    return TypeAdapter(kind).validate_python(sections)


def test_an_evaluation_beside_the_miner_changes_nothing_and_encodes_nothing_twice(tmp_path):
    write_tiny_dataset(tmp_path / "data", num_queries=250)
    write_tiny_encoder(tmp_path / "encoder")
    for name in ("undisturbed", "raced"):
        (tmp_path / f"{name}.log").touch()
        run_ranks(take_part, 2 if name == "undisturbed" else 3, tmp_path, name, name == "raced")
    weights = [
        (checkpoints_folder(tmp_path / name) / checkpoint_name(STEPS) / "encoder" / "model.safetensors").read_bytes()
        for name in ("undisturbed", "raced")
    ]
    before = checkpoints_folder(tmp_path / "raced") / checkpoint_name(STEPS - EVERY) / "encoder" / "model.safetensors"
    assert weights[0] == weights[1] != before.read_bytes()
    embedded = [line.split() for line in (tmp_path / "raced.log").read_text().splitlines()]
    assert set(Counter((folder, shard) for folder, shard, _ in embedded).values()) == {1}
    by_folder = {folder: {who for f, _, who in embedded if f == folder} for folder, _, _ in embedded}
    assert sum(len(who) == 2 for who in by_folder.values()) == len(SCHEDULE), "the passages of both checkpoints were shared"
