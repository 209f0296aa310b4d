"""A run folder for tests of the service: tiny data, published tiny checkpoints, and services as real MPI processes.

As a program: `python -m tests.mining.run PLANS.json` is one rank of several services, one after the other.
"""

import json
import os
import subprocess
import sys
import traceback
import unittest.mock
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from launch.srun import outside_slurm
from mining.job import MineJob
from mining.ranks import Ranks
from tests.mining.talk import check_heard, talk
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_data
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder, weights_digest
from trainer.errors import InputError
from trainer.handoff.manifest import publish_version, write_latest
from trainer.handoff.negatives import negatives_folder
from trainer.handoff.weights import checkpoint_name, checkpoints_folder

REPOSITORY = Path(__file__).parents[2]


def make_job(tmp_path: Path, num_queries: int = 300, run: str = "run", **sections) -> dict:
    """Return a job as JSON, and write its data unless they are there."""
    data = tmp_path / "data"
    if not data.exists():
        write_tiny_dataset(data, num_queries=num_queries)
    return {
        "run": {"folder": str(tmp_path / run), "seed": 7},
        "data": {"path": str(data), "cache": str(tmp_path / "cache")},
        "search": {"top_k": 40},
        "filter": {"relative_margin": "off"},  # a random encoder puts all texts near to each other
        "sample": {"num_negatives": 5},
        "mine": {"bm25_top_k": 20, "poll_s": 0.2},
        **sections,
    }


def as_job(job: dict) -> MineJob:
    """Return the job as the service takes it."""
    return TypeAdapter(MineJob).validate_json(json.dumps(job))


def publish_checkpoint(job: dict, step: int, towers: Literal["one", "two"] = "one", source: Path | None = None, **model) -> Path:
    """Publish an encoder, a random one by default, as the checkpoint of a step and return its folder. Two towers differ.

    model: more of the section `model`.
    """
    run, data = Path(job["run"]["folder"]), Path(job["data"]["path"])
    source = source or write_tiny_encoder(data.parent / f"encoder-{step}", seed=step)
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(source), towers=towers, **model))
    if towers == "two":
        other, *_ = load_encoder(ModelSettings(name=str(write_tiny_encoder(data.parent / f"other-{step}", seed=step + 1))))
        encoder.side("passage").load_state_dict(other.state_dict())
    settings = as_job(job)
    digest = open_data(settings.data, settings.sources).digest

    def write(folder: Path) -> None:
        (folder / "encoder").mkdir()
        save_encoder(folder / "encoder", encoder, tokenizer, traits)

    folder = checkpoints_folder(run) / checkpoint_name(step)
    publish_version(folder, write, {"step": step, "weights_digest": weights_digest(encoder), "data_digest": digest})
    write_latest(folder.parent, folder.name)
    return folder


Plan = tuple[dict, int, str | None]  # a job, ranks of its service, and the checkpoint to mine, None: the newest


def run_on_ranks(num_ranks: int, plans: list[Plan]) -> tuple[int, str]:
    """Run the service of each plan, one after the other, in one MPI world; return exit code and words."""
    path = Path(plans[0][0]["data"]["path"]).parent / "plans.json"
    path.write_text(json.dumps(plans))
    mpiexec = [
        *outside_slurm(),
        str(Path(sys.executable).parent / "mpiexec"),
        "--oversubscribe",
        "--allow-run-as-root",
        "-n",
        str(num_ranks),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    words = [*mpiexec, sys.executable, "-m", "tests.mining.run", str(path)]
    done = subprocess.run(words, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def published(job: dict) -> dict[str, bytes]:
    """Return the arrays of all versions of a run by file name, as bytes."""
    folder = negatives_folder(Path(job["run"]["folder"]))
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("v*/*.npy"))}


def rows_of(job: dict, version: str) -> list[np.ndarray]:
    """Return the ids of each row of a version."""
    folder = negatives_folder(Path(job["run"]["folder"])) / version
    return np.split(np.load(folder / "ids.npy"), np.load(folder / "indptr.npy")[1:-1])


def speak(comm: Any) -> None:
    """Check that ranks hear each other, and arrays in rounds of a few bytes; end all ranks if not. Collective."""
    try:
        for round_bytes in (7, 1 << 28):
            with unittest.mock.patch("mining.ranks.ROUND_BYTES", round_bytes):
                check_heard(comm.rank, comm.size, talk(Ranks(comm, lambda: False)))
    except Exception:
        traceback.print_exc()
        comm.Abort(1)


def main() -> int:
    """Run one rank of each plan that it takes part in, after a few words with the others."""
    from mpi4py import MPI

    from mining.service import run_service

    world = MPI.COMM_WORLD
    for num_ranks in range(1, world.size + 1):
        speak(world.Split(0 if world.rank < num_ranks else 1))
    for job, num_ranks, checkpoint in json.loads(Path(sys.argv[1]).read_text()):
        comm = world.Split(0 if world.rank < num_ranks else MPI.UNDEFINED)
        if comm != MPI.COMM_NULL:
            try:
                run_service(as_job(job), comm, once=True, checkpoint=checkpoint)
            except InputError as error:
                print(f"negpool: {error}", file=sys.stderr)
                return 2
        world.Barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main())
