"""Runs to which something happens end with the parameters of an undisturbed one: real ranks, dropout on, fixed negatives.

Faults are put in by functions that each rank calls before it trains; the ranks come from a fork server, as in test_resume.py.
"""

import functools
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.system.test_resume import Ranks, lines
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.handoff.manifest import MANIFEST, _size_and_hash, read_latest
from trainer.handoff.negatives import ScheduleEntry, publish_negatives
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings
from trainer.handoff.weights import open_checkpoint
from trainer.job import (
    BatchSettings,
    CheckpointSettings,
    ChunkSettings,
    EmaSettings,
    LossSettings,
    ModelSettings,
    OptimSettings,
    TrainJob,
)
from trainer.metrics import read_status

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
    manifest["files"][str(part.relative_to(checkpoint))] = _size_and_hash(part)
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
