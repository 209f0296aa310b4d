"""MRR@10 of a run's checkpoints, measured when the run is over, in a process of its own: no evaluation disturbs what is timed."""

import tempfile
from pathlib import Path

import torch

from launch.jobfile import read_job
from launch.ranks import answer, on_ranks
from trainer.data.datasets import open_data
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.evaluate import evaluate
from trainer.handoff.manifest import versions
from trainer.handoff.weights import ENCODER, Checkpoint, checkpoints_folder, open_checkpoint
from trainer.world import stay_alone

MEASURE = "mrr@10"


def scores_of(run: Path, split: str, every: int) -> dict[int, float]:
    """Return the measure of a run's checkpoints by step: of the multiples of a number, and of the last one."""
    found = on_ranks("launch.bench.overlap.dev_scores", 1, run=str(run), split=split, every=every)
    return {int(step): score for step, score in found.items()}


def score_checkpoints(run: str, split: str, every: int) -> dict[str, float]:
    """Return the same in this process, by the step as JSON has it."""
    job = read_job(Path(run) / "job.toml", []).train
    data = open_data(job.data, job.sources)
    world = stay_alone(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
    found: dict[str, float] = {}
    for checkpoint in _scored(Path(run), every):
        parts = load_encoder(ModelSettings(name=str(checkpoint.encoder_folder)))
        parts[0].to(world.device)
        with tempfile.TemporaryDirectory(dir=run) as shards:
            found[str(checkpoint.step)] = evaluate(world, data, split, *parts, Path(shards))[MEASURE]
    return found


def _scored(run: Path, every: int) -> list[Checkpoint]:
    found = [open_checkpoint(folder, ENCODER) for folder in versions(checkpoints_folder(run))]
    return [checkpoint for checkpoint in found if checkpoint.step % every == 0 or checkpoint is found[-1]]


if __name__ == "__main__":
    answer(score_checkpoints)
