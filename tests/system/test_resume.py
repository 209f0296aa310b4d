"""Runs that are killed again and again, or go on with another number of ranks: real ranks, real SIGKILL, dropout on.

The ranks come from a fork server that has imported everything once, so that a kill costs a fraction of a second; torchrun
itself is in test_run.py.
"""

import json
import multiprocessing
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.errors import EXIT_MUST_NOT_GO_ON, MustNotGoOn
from trainer.handoff.manifest import open_version, versions
from trainer.handoff.negatives import publish_negatives
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings, ScheduleEntry
from trainer.handoff.weights import newest_checkpoint
from trainer.job import (
    BatchSettings,
    CheckpointSettings,
    ChunkSettings,
    LossSettings,
    ModelSettings,
    OptimSettings,
    TrainJob,
)
from trainer.state import Outcome

NUM_STEPS = 60
TIMEOUT_S = 240
SWAPS = [(0, 0), (20, 1), (40, 2)]  # (step, version)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder", dropout=0.1)
    return folder


def job_of(root: Path, name: str, dropout: float | None = None) -> TrainJob:
    """A job whose negatives are swapped at fixed steps, with its negatives published."""
    schedule = tuple(ScheduleEntry(checkpoint=10 * (version - 1), step=step) for step, version in SWAPS[1:])
    job = TrainJob(
        run=RunSettings(folder=root / name),
        data=DataSettings(path=root / "data", cache=root / "cache"),
        model=ModelSettings(name=str(root / "encoder"), dropout=dropout),
        batch=BatchSettings(queries=7),
        chunk=ChunkSettings(tokens=48, keep_graphs=1),
        loss=LossSettings(learn_temperature=True),
        optim=OptimSettings(steps=NUM_STEPS, lr=1e-3),
        checkpoint=CheckpointSettings(every_steps=5, keep=3),
        negatives=NegativesSettings(per_query=2, schedule=schedule),
    )
    data = open_dataset(job.data.path, job.data.cache)
    num_queries = len(data.training_queries())
    for step, version in SWAPS:
        ids = np.random.default_rng(version).integers(0, len(data.corpus), 4 * num_queries)
        fields = {"checkpoint_step": step or None}
        publish_negatives(job.run.folder, version, np.arange(num_queries + 1) * 4, ids, np.zeros(len(ids)), fields)
    return job


def train_rank(rank: int, num_ranks: int, port: int, job: TrainJob, fault: Callable[[int], None]) -> None:
    """One rank's whole life."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, OMP_NUM_THREADS="1", LOCAL_WORLD_SIZE=str(num_ranks))
    from trainer.train import train
    from trainer.world import join_world

    fault(rank)
    world = join_world()
    try:
        outcome: Outcome = train(job, world)
    except MustNotGoOn as error:
        (job.run.folder / f"must-not-go-on-{rank}").write_text(str(error))
        os._exit(EXIT_MUST_NOT_GO_ON)
    world.leave()
    os._exit(0 if outcome.finished else 75)


def no_fault(rank: int) -> None:
    """Change nothing."""


class Ranks:
    """Some trainer ranks, alive."""

    def __init__(self, num_ranks: int, job: TrainJob, fault: Callable[[int], None] = no_fault):
        """fault: called with its number in each rank before it trains, to break something there; picklable."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["trainer.train", "torch.utils.tensorboard", "datasets", "tests.ranks"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [context.Process(target=train_rank, args=(r, num_ranks, port, job, fault)) for r in range(num_ranks)]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        """End all at once, as a lost machine does."""
        for process in self.processes:
            process.kill()
        self.codes()

    def stop(self) -> list[int | None]:
        """Ask for a stop, as Slurm does; return the exit codes."""
        os.kill(self.processes[0].pid, 10)  # SIGUSR1
        return self.codes()

    def codes(self) -> list[int | None]:
        """Wait for all and return their exit codes."""
        for process in self.processes:
            process.join(TIMEOUT_S)
        assert not any(process.is_alive() for process in self.processes), "the ranks did not end"
        return [process.exitcode for process in self.processes]


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def last_step(run: Path) -> int:
    try:
        return max((line["step"] for line in lines(run) if "loss" in line), default=0)
    except FileNotFoundError:
        return 0


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while last_step(run) < step:
        assert time.monotonic() < deadline, f"step {step} never came"
        time.sleep(0.01)


def final_state(run: Path) -> dict[str, np.ndarray]:
    """Return every tensor of the last checkpoint as one row of elements."""
    found: dict[str, list] = {}
    folder = run / "checkpoints" / f"step-{NUM_STEPS:08d}" / "state"
    for part in sorted(folder.glob("part-*")):
        for name, values in load_file(part).items():
            found.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in found.items()}


def batches(run: Path) -> dict[int, str]:
    """Return the key of every step's global batch; a step that was taken twice must have had the same one."""
    found: dict[int, str] = {}
    for line in lines(run):
        if "loss" in line:
            assert found.setdefault(line["step"], line["batch_key"]) == line["batch_key"]
    return found


@pytest.fixture(scope="module")
def undisturbed(root):
    job = job_of(root, "undisturbed")
    assert Ranks(2, job).codes() == [0, 0]
    swaps = [(line["step"], line["negatives/version"]) for line in lines(job.run.folder) if "negatives/checkpoint_step" in line]
    assert swaps == SWAPS
    return job.run.folder


def test_ten_kills_at_random_moments_change_no_bit(root, undisturbed):
    job, draw = job_of(root, "killed"), random.Random(0)
    killed_at = []
    for number in range(10):
        ranks = Ranks(2, job)
        wait_for_step(job.run.folder, min(NUM_STEPS - 6, last_step(job.run.folder) + draw.randrange(1, 7)))
        time.sleep(draw.random() / 20)  # anywhere in a step, a save or a swap
        ranks.kill()
        killed_at.append(last_step(job.run.folder))
        for version in versions(job.run.folder / "checkpoints"):
            open_version(version)
        assert number == 0 or killed_at[-1] < NUM_STEPS, killed_at
    assert Ranks(2, job).codes() == [0, 0]
    wanted, found = final_state(undisturbed), final_state(job.run.folder)
    assert found.keys() == wanted.keys() and len(wanted) > 30
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert batches(job.run.folder) == batches(undisturbed)


def test_fewer_ranks_go_on_with_the_same_batches_and_the_same_trajectory(root):
    whole, shrinking = (job_of(root, name, dropout=0.0) for name in ("whole", "shrinking"))
    assert Ranks(1, whole).codes() == [0]
    for num_ranks, step in ((3, 15), (2, 35)):
        ranks = Ranks(num_ranks, shrinking)
        wait_for_step(shrinking.run.folder, step)
        assert ranks.stop() == [75] * num_ranks, "SIGUSR1 of one rank stops all, and saves"
    assert Ranks(1, shrinking).codes() == [0]
    assert batches(shrinking.run.folder) == batches(whole.run.folder)
    assert len(batches(whole.run.folder)) == NUM_STEPS
    losses = [{line["step"]: line["loss"] for line in lines(job.run.folder) if "loss" in line} for job in (whole, shrinking)]
    for step, loss in losses[0].items():
        # float32 sums in another order, fed back through AdamW for sixty steps
        assert losses[1][step] == pytest.approx(loss, rel=2e-3, abs=1e-4), step


def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(root, undisturbed):
    job = job_of(root, "torn")
    ranks = Ranks(2, job)
    wait_for_step(job.run.folder, 12)
    assert ranks.stop() == [75, 75]
    *_, before, newest = versions(job.run.folder / "checkpoints")
    part = newest / "state" / "part-00000-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-8] + b"\0" * 8)
    said: list[str] = []
    found = newest_checkpoint(job.run.folder, lambda torn: said.append(str(torn)))
    assert found is not None and found.folder.name == before.name
    assert "part-00000-of-00002.safetensors is not what its manifest says" in said[0]
    assert Ranks(2, job).codes() == [0, 0]
    wanted, state = final_state(undisturbed), final_state(job.run.folder)
    for name, values in wanted.items():
        np.testing.assert_array_equal(state[name], values, err_msg=name)
