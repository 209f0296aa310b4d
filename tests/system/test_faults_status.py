"""A run whose disk fails for a while ends with the parameters of an undisturbed one: a real process, no write mocked in ours."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.handoff.manifest import open_version, versions
from trainer.handoff.negatives import publish_negatives
from trainer.metrics import read_status

ROOT = Path(__file__).parent.parent.parent
NUM_STEPS = 60
JOB = """
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
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("status")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder", dropout=0.1)
    (folder / "job.toml").write_text(JOB.format(root=folder))
    data = open_dataset(folder / "data", folder / "cache")
    num_queries = len(data.training_queries())
    for name in ("undisturbed", "disturbed"):
        for version in (0, 1):
            ids = np.random.default_rng(version).integers(0, len(data.corpus), 4 * num_queries)
            fields = {"checkpoint_step": version * 10 or None}
            publish_negatives(folder / name, version, np.arange(num_queries + 1) * 4, ids, np.zeros(len(ids)), fields)
    return folder


def start(root: Path, name: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch", "train", str(root / "job.toml"), f"run.folder={root}/{name}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}, cwd=ROOT)


def parameters(run: Path) -> dict[str, bytes]:
    """Return the bytes of what is published and of what a resume reads: weights and moments."""
    folder = run / "checkpoints" / f"step-{NUM_STEPS:08d}"
    files = [folder / "encoder" / "model.safetensors", *(folder / "state").glob("part-*")]
    assert len(files) == 2
    return {file.name: file.read_bytes() for file in files}


def test_a_disk_that_fails_for_a_while_changes_no_parameter(root):
    faulty = f"{ROOT / 'tests' / 'system' / 'faulty'}:{ROOT}"
    both = [start(root, "undisturbed"), start(root, "disturbed", PYTHONPATH=faulty, FAULTY_RUN=str(root / "disturbed"))]
    said = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said[1][-3000:]
    run = root / "disturbed"
    assert parameters(run) == parameters(root / "undisturbed")

    refused = Counter((run / "refused").read_text())
    assert refused["s"] >= 15 and refused["l"] >= 15 and refused["c"] == 3, "heartbeats, figures and a checkpoint failed"
    assert said[1].count("the status is not told, and the run goes on") == 1, "once, not at each step"
    assert said[1].count("metrics wait until they can be written") == 1
    assert said[1].count("step-00000040 failed: Stale file handle") == 3
    assert said[1].count("tensorboard fails, the run goes on without it") == 1
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, NUM_STEPS + 1)), "no figure is lost"
    assert read_status(run, "trainer")["phase"] == "finished"
    assert [open_version(folder)["step"] for folder in versions(run / "checkpoints")] == list(range(0, NUM_STEPS + 1, 10))
