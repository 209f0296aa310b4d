"""Precision that a job leaves open: settled once for all ranks, kept with what a run leaves, told where it changes."""

import json
import shutil
import tomllib

import pytest

import trainer.precision
from launch.jobfile import read_job, refuse_other_job, write_job
from launch.sides import keep_job, settled_by
from tests.ranks import run_ranks
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.errors import InputError
from trainer.handoff.weights import newest_checkpoint
from trainer.job import PrecisionSettings
from trainer.precision import settled_precision
from trainer.train import train

JOB = [
    "batch.queries=7",
    "chunk.tokens=64",
    "optim.lr=1e-3",
    "checkpoint.every_steps=2",
    "negatives.per_query=0",
    "run.trackers=[]",
]
HALF = PrecisionSettings(encode="bf16", products="bf16")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder", dropout=0.0)
    return folder


def job_of(root, run, *more):
    own = [f"run.folder={run}", f"data.path={root}/data", f"data.cache={root}/cache", f"model.name={root}/encoder"]
    return read_job(None, [*own, *JOB, "eval.split=none", *more])


def trained(jobs):
    """Train as `negpool train` does, and return the losses."""
    world = world_of()
    keep_job(jobs, remarks=settled_by(jobs, world))
    assert train(jobs.train, world).finished
    lines = (jobs.train.run.folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return [values["loss"] for values in map(json.loads, lines) if "loss" in values]


def settled_on_rank(rank, has_bf16):
    trainer.precision.takes_bf16 = lambda device: has_bf16[rank]
    found = settled_precision(PrecisionSettings(), world_of(rank))
    return found.encode, found.products


@pytest.mark.parametrize(("has_bf16", "wanted"), [((True, True), "bf16"), ((True, False), "fp32"), ((False,), "fp32")])
def test_ranks_compute_alike_whatever_gpus_they_have(has_bf16, wanted):
    assert run_ranks(settled_on_rank, len(has_bf16), has_bf16) == [(wanted, wanted)] * len(has_bf16)


def test_a_run_on_a_cpu_computes_what_float32_does_and_says_so(root, tmp_path, caplog):
    caplog.set_level("INFO")
    found = trained(job_of(root, tmp_path / "open", "optim.steps=3"))
    asked = job_of(root, tmp_path / "asked", "optim.steps=3", "precision.encode=fp32", "precision.products=fp32")
    assert trained(asked) == found and found[0] > 0
    assert caplog.text.count("precision.encode=fp32 and precision.products=fp32 on the CPU") == 1
    kept = (tmp_path / "open" / "job.toml").read_text()
    assert [line for line in kept.splitlines() if "#" in line] == [
        'encode = "auto"  # fp32 on the CPU',
        'products = "auto"  # fp32 on the CPU',
        'dtype = "auto"  # fp32 on the CPU',
        'stored = "auto"  # fp32 on the CPU',
    ]
    assert tomllib.loads(kept)["precision"] == {"encode": "auto", "products": "auto", "tf32": False}
    assert newest_checkpoint(tmp_path / "open").manifest["precision"] == {"encode": "fp32", "products": "fp32"}


def test_a_run_goes_on_in_the_precision_of_another_device_and_says_so(root, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    jobs = job_of(root, tmp_path / "run", "optim.steps=4")
    with monkeypatch.context() as on_another_device:
        on_another_device.setattr(trainer.precision, "settled_precision", lambda settings, world: HALF)
        half = trained(jobs)
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint.manifest["precision"] == {"encode": "bf16", "products": "bf16"}
    shutil.rmtree(checkpoint.folder)
    went_on = trained(jobs)
    told = "from step 2 on precision.encode was bf16 and is fp32, precision.products was bf16 and is fp32"
    assert told in caplog.text and len(went_on) == 6, "four steps, and two again"
    assert went_on[:4] == half and went_on[4:] != half[2:]
    assert went_on[4:] == pytest.approx(half[2:], rel=0.05), "bfloat16 has 8 bits"


def test_what_an_older_version_resolved_may_be_left_open_now_and_not_the_other_way_round(root, tmp_path):
    kept, now = tmp_path / "job.toml", job_of(root, tmp_path / "run")
    resolved = ["precision.encode=fp32", "precision.products=fp32", "encode.dtype=fp32", "encode.stored=fp32"]
    write_job(kept, job_of(root, tmp_path / "run", *resolved))
    refuse_other_job(kept, now)
    write_job(kept, now)
    with pytest.raises(InputError, match=r"holds a run with precision\.encode='auto', and this job has 'bf16'"):
        refuse_other_job(kept, job_of(root, tmp_path / "run", "precision.encode=bf16"))
