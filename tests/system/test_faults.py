"""Runs to which something happens end with the parameters of an undisturbed one: real ranks, dropout on, fixed negatives.

Faults are put in by functions that each rank calls before it trains; the ranks come from a fork server, as in test_resume.py.
"""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.ranks import run_ranks
from tests.system.test_resume import Ranks, lines
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.encoder.model import load_encoder
from trainer.encoder.shards import Shards
from trainer.evaluate import evaluate
from trainer.handoff.digests import describe_file
from trainer.handoff.manifest import MANIFEST, open_version, read_latest, versions
from trainer.handoff.negatives import publish_negatives
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings, ScheduleEntry
from trainer.handoff.weights import checkpoint_name, checkpoints_folder, open_checkpoint
from trainer.job import (
    BatchSettings,
    CheckpointSettings,
    ChunkSettings,
    EmaSettings,
    ModelSettings,
    OptimSettings,
    TrainJob,
)
from trainer.loss_settings import LossSettings
from trainer.metrics import read_status
from trainer.world import World

NUM_STEPS, SAVED_EVERY, BROKEN_STEP = 12, 2, 5
SWAPS = [(0, 0), (6, 1)]  # (step, version)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder", dropout=0.1)
    return folder


def job_of(root: Path, name: str) -> TrainJob:
    """A short job whose negatives are published and swapped at fixed steps."""
    job = TrainJob(
        run=RunSettings(folder=root / name, trackers=()),
        data=DataSettings(path=root / "data", cache=root / "cache"),
        model=ModelSettings(name=str(root / "encoder")),
        batch=BatchSettings(queries=7),
        chunk=ChunkSettings(tokens=48, keep_graphs=1),
        loss=LossSettings(learn_temperature=True),
        optim=OptimSettings(steps=NUM_STEPS, lr=1e-3, max_skipped=4),
        ema=EmaSettings(decay=0.5),
        checkpoint=CheckpointSettings(every_steps=SAVED_EVERY),
        negatives=NegativesSettings(per_query=2, schedule=(ScheduleEntry(checkpoint=0, step=SWAPS[1][0]),)),
    )
    data = open_dataset(job.data.path, job.data.cache)
    num_queries = len(data.training_queries())
    for step, version in SWAPS:
        ids = np.random.default_rng(version).integers(0, len(data.corpus), 4 * num_queries)
        publish_negatives(
            job.run.folder, version, np.arange(num_queries + 1) * 4, ids, np.zeros(len(ids)), {"checkpoint_step": step or None}
        )
    return job


def newest(run: Path) -> Path:
    return run / "checkpoints" / str(read_latest(run / "checkpoints"))


def parameters_of(run: Path) -> dict[str, np.ndarray]:
    """Return all that the last checkpoint holds: weights, moments, averages, temperature; each as one row of elements."""
    found: dict[str, list] = {}
    folder = open_checkpoint(newest(run)).folder / "state"
    for part in sorted(folder.glob("part-*")):
        for name, values in load_file(part).items():
            found.setdefault(name, []).append(values)
    temperature = json.loads((folder / "trainer.json").read_text())["temperature"]
    return {name: np.concatenate(values) for name, values in found.items()} | {
        "temperature": np.array(list(temperature.values()))
    }


def assert_same(run: Path, wanted: Path) -> None:
    """Assert that two runs ended with the same bits."""
    found, expected = parameters_of(run), parameters_of(wanted)
    assert newest(run).name == newest(wanted).name == f"step-{NUM_STEPS:08d}"
    assert found.keys() == expected.keys() and len(expected) > 30
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def wrap(name: str, wrapper: Callable) -> None:
    """Put a function around one that the training loop calls: `wrapper` gets the original and its arguments."""
    import trainer.train

    original = getattr(trainer.train, name)
    setattr(trainer.train, name, functools.partial(wrapper, original))


def poison(first: int, last: int, rank: int) -> None:
    """Break the gradient that reaches the second rank's encoder in some steps."""
    from tests.trainer.test_update import Poison

    def broken_step(cached_step, batch, **options):
        if rank == 1 and first <= options["step"] <= last:
            towers = [replace(t, encode=functools.partial(_poisoned, Poison, t.encode)) for t in batch.towers]
            batch = replace(batch, towers=towers)
        return cached_step(batch, **options)

    wrap("cached_step", broken_step)


def _poisoned(poison, encode, inputs):
    return poison.apply(encode(inputs))


def leave_out(step: int, rank: int) -> None:
    """Forget the gradients of one step in the place of an update."""

    def no_update(update, run):
        if run.state.step != step:
            return update(run)
        run.state.parallel.encoder.zero_grad(set_to_none=True)
        run.state.temperature.zero_grad(set_to_none=True)
        return 0.0

    wrap("update", no_update)


def die_before(step: int, rank: int) -> None:
    """Kill every rank before a step, with all that was to be saved on disk."""

    def last_step(take_step, run):
        if run.state.step == step:
            run.saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(run)

    wrap("step", last_step)


@pytest.fixture(scope="module")
def undisturbed(root):
    job = job_of(root, "undisturbed")
    assert Ranks(2, job).codes() == [0, 0]
    return job.run.folder


def test_a_poisoned_gradient_costs_its_update_and_nothing_else(root, undisturbed):
    job, wanted = job_of(root, "poisoned"), job_of(root, "without one update")
    assert Ranks(2, wanted, functools.partial(leave_out, BROKEN_STEP)).codes() == [0, 0]
    assert Ranks(2, job, functools.partial(poison, BROKEN_STEP, BROKEN_STEP)).codes() == [0, 0]
    assert_same(job.run.folder, wanted.run.folder)
    assert any((parameters_of(undisturbed)[name] != values).any() for name, values in parameters_of(job.run.folder).items())
    steps = [line for line in lines(job.run.folder) if "loss" in line]
    assert [line["skipped"] for line in steps] == [int(line["step"] > BROKEN_STEP) for line in steps]
    assert math.isnan(steps[BROKEN_STEP]["grad_norm"]) and read_status(job.run.folder, "trainer")["skipped"] == 1


def test_gradients_that_stay_broken_end_the_run_and_each_start_of_it(root):
    job, fault = job_of(root, "stays broken"), functools.partial(poison, BROKEN_STEP, NUM_STEPS)
    for num_steps in (BROKEN_STEP + 4, 1):  # the last checkpoint knows that three were left out
        first = len(lines(job.run.folder)) if num_steps == 1 else 0
        assert Ranks(2, job, fault).codes() == [78, 78]
        assert sum("loss" in line for line in lines(job.run.folder)[first:]) == num_steps
    sentence = (job.run.folder / "must-not-go-on-0").read_text()
    assert "4 updates in a row" in sentence and str(job.run.folder / "checkpoints" / "step-00000004") in sentence
    assert all(np.isfinite(values).all() for values in parameters_of(job.run.folder).values())


def test_a_budget_found_with_the_first_batch_survives_a_kill(root):
    """Chunks are as long as the longest text of the batch that is probed: 17 tokens here, 15 where the killed run goes on."""
    wanted, job = (with_little_memory(job_of(root, name)) for name in ("budget", "budget, killed"))
    assert Ranks(2, wanted).codes() == [0, 0]
    assert Ranks(2, job, functools.partial(die_before, 9)).codes() == [-signal.SIGKILL] * 2
    assert Ranks(2, job).codes() == [0, 0]
    tokens = [line["chunk_tokens"] for line in lines(job.run.folder) if "loss" in line]
    assert len(tokens) == NUM_STEPS + 1 and len(set(tokens)) == 1
    assert_same(job.run.folder, wanted.run.folder)


def with_little_memory(job: TrainJob) -> TrainJob:
    """Return the job with chunks of the least size that is ever chosen: beside this memory's fixed parts little is left."""
    return replace(job, chunk=ChunkSettings(memory_gib=0.5013))


def spoil(checkpoint: Path) -> None:
    """Put NaN into a checkpoint, as versions before this one have published it: with a manifest that fits."""
    (part, *_) = sorted((checkpoint / "state").glob("part-*"))
    tensors = load_file(part)
    name = next(name for name in tensors if name.startswith("parameter."))
    tensors[name][0] = torch.nan
    with safe_open(part, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, part, metadata)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][str(part.relative_to(checkpoint))] = describe_file(part)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_a_last_checkpoint_with_nan_is_passed_over_and_written_anew(root, undisturbed):
    job = job_of(root, "last checkpoint with NaN")
    assert Ranks(2, job, functools.partial(die_before, 9)).codes() == [-signal.SIGKILL] * 2
    spoiled = newest(job.run.folder)
    assert spoiled.name == "step-00000008"
    spoil(spoiled)
    assert Ranks(2, job).codes() == [0, 0]
    assert_same(job.run.folder, undisturbed)
    assert open_checkpoint(spoiled).step == 8, "this time it is finite"


RACE_STEPS, RACE_EVERY = 6, 2
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
    run, here = root / name, World(0, 1, torch.device("cpu"), None, None)
    in_lockstep(root / f"{name}.log", int(is_disturbed))
    shared = {"run": {"folder": run, "trackers": ()}, "data": {"path": root / "data", "cache": root / "cache"}}
    shared["negatives"] = {"schedule": SCHEDULE, "first_wait_s": 60}
    if rank == 0:
        from trainer.job import TrainJob
        from trainer.train import train

        steps = {"optim": {"steps": RACE_STEPS, "lr": 1e-3}, "checkpoint": {"every_steps": RACE_EVERY}, "batch": {"queries": 8}}
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
        (checkpoints_folder(tmp_path / name) / checkpoint_name(RACE_STEPS) / "encoder" / "model.safetensors").read_bytes()
        for name in ("undisturbed", "raced")
    ]
    before = checkpoints_folder(tmp_path / "raced") / checkpoint_name(RACE_STEPS - RACE_EVERY) / "encoder" / "model.safetensors"
    assert weights[0] == weights[1] != before.read_bytes()
    embedded = [line.split() for line in (tmp_path / "raced.log").read_text().splitlines()]
    assert set(Counter((folder, shard) for folder, shard, _ in embedded).values()) == {1}
    by_folder = {folder: {who for f, _, who in embedded if f == folder} for folder, _, _ in embedded}
    assert sum(len(who) == 2 for who in by_folder.values()) == len(SCHEDULE), "the passages of both checkpoints were shared"


ROOT = Path(__file__).parent.parent.parent
DISK_STEPS = 60
DISK_JOB = """
[run]
trackers = ["tensorboard"]
[data]
path = "{root}/data"
cache = "{root}/cache"
[model]
name = "{root}/encoder"
[batch]
queries = 7
[chunk]
tokens = 48
[optim]
steps = 60
lr = 1e-3
[checkpoint]
every_steps = 10
keep = 9
[negatives]
per_query = 2
schedule = [{{checkpoint = 10, step = 20}}]
"""


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("status")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder", dropout=0.1)
    (folder / "job.toml").write_text(DISK_JOB.format(root=folder))
    data = open_dataset(folder / "data", folder / "cache")
    num_queries = len(data.training_queries())
    for name in ("undisturbed", "disturbed"):
        for version in (0, 1):
            ids = np.random.default_rng(version).integers(0, len(data.corpus), 4 * num_queries)
            fields = {"checkpoint_step": version * 10 or None}
            publish_negatives(folder / name, version, np.arange(num_queries + 1) * 4, ids, np.zeros(len(ids)), fields)
    return folder


def start_trainer(root: Path, name: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "negpool", "train", str(root / "job.toml"), f"run.folder={root}/{name}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}, cwd=ROOT)


def files_of(run: Path) -> dict[str, bytes]:
    """Return the bytes of what is published and of what a resume reads: weights and moments."""
    folder = run / "checkpoints" / f"step-{DISK_STEPS:08d}"
    files = [folder / "encoder" / "model.safetensors", *(folder / "state").glob("part-*")]
    assert len(files) == 2
    return {file.name: file.read_bytes() for file in files}


def test_a_disk_that_fails_for_a_while_changes_no_parameter(two_runs):
    root = two_runs
    faulty = f"{ROOT / 'tests' / 'system' / 'faulty'}:{ROOT}"
    both = [
        start_trainer(root, "undisturbed"),
        start_trainer(root, "disturbed", PYTHONPATH=faulty, FAULTY_RUN=str(root / "disturbed")),
    ]
    said = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said[1][-3000:]
    run = root / "disturbed"
    assert files_of(run) == files_of(root / "undisturbed")

    refused = Counter((run / "refused").read_text())
    assert refused["s"] >= 15 and refused["l"] >= 15 and refused["c"] == 3, "heartbeats, figures and a checkpoint failed"
    assert said[1].count("the status is not told, and the run goes on") == 1, "once, not at each step"
    assert said[1].count("metrics wait until they can be written") == 1
    assert said[1].count("step-00000040 failed: Stale file handle") == 3
    assert said[1].count("tensorboard fails, the run goes on without it") == 1
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, DISK_STEPS + 1)), "no figure is lost"
    assert read_status(run, "trainer")["phase"] == "finished"
    assert [open_version(folder)["step"] for folder in versions(run / "checkpoints")] == list(range(0, DISK_STEPS + 1, 10))
