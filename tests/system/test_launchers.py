"""The trainer under everybody's launcher and every backend: real processes, one result, whatever the working folder holds."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.tiny import write_own_modules, write_tiny_dataset, write_tiny_encoder
from trainer.errors import InputError
from trainer.job import ParallelSettings

ROOT = Path(__file__).parent.parent.parent
LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "negpool"],
    **{backend: ["accelerate", "launch", "--config_file", str(ROOT / f"launch/accelerate/{backend}.yaml"),
                 "--num_processes", "2", "-m", "negpool"] for backend in ("ddp", "fsdp2", "zero2", "zero3")},
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--no_local_rank", "--module", "negpool"],
}  # fmt: skip
JOB = """
[data]
path = "{root}/data"
cache = "{root}/cache"
[model]
name = "{root}/encoder"
[batch]
queries = 7
[chunk]
tokens = 48
keep_graphs = 1
[loss]
learn_temperature = true
[optim]
steps = 8
lr = 1e-3
[checkpoint]
every_steps = 4
[negatives]
per_query = 0
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launchers")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder", dropout=0.0)
    write_own_modules(folder / "work")
    (folder / "job.toml").write_text(JOB.format(root=folder))
    return folder


def launch(root, launcher, name, *overrides, exit_code=0):
    """Train under a launcher; return the JSON object, or all that was said where there is none."""
    program, *words = LAUNCHERS[launcher]
    command = [Path(sys.executable).parent / program, *words, "train", root / "job.toml", f"run.folder={root}/{name}", *overrides]
    ended = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True, timeout=240, cwd=root / "work")
    said = ended.stdout + ended.stderr
    assert (ended.returncode == 0) == (exit_code == 0), said[-3000:]
    return json.loads(next(line for line in ended.stdout.splitlines() if line.startswith('{"fin'))) if exit_code == 0 else said


def losses(root, name):
    lines = (root / name / "logs" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.fixture(scope="module")
def wanted(root):
    assert launch(root, "torchrun", "ddp")["finished"]
    assert losses(root, "ddp")[0] > 0.5
    return losses(root, "ddp")


@pytest.mark.parametrize(
    ("launcher", "backend", "overrides"),
    [
        ("fsdp2", "fsdp2", []),
        ("zero2", "zero2", []),
        ("zero3", "zero3", [f"parallel.deepspeed={ROOT}/launch/deepspeed/zero3_small_gpus.json"]),
        ("ddp", "fsdp2", ["parallel.backend=fsdp2"]),
        ("deepspeed", "zero2", ["parallel.backend=zero2", f"parallel.deepspeed={ROOT}/launch/deepspeed/buckets.json"]),
        ("torchrun", "zero1", ["parallel.backend=zero1"]),
    ],
)
def test_every_launcher_and_backend_trains_the_same_model(root, wanted, launcher, backend, overrides):
    if "zero" in backend:
        pytest.importorskip("deepspeed")
    name = f"{launcher}-{backend}"
    found = launch(root, launcher, name, *overrides)
    assert found["finished"] and found["step"] == 8
    assert losses(root, name) == pytest.approx(wanted, rel=1e-4), "float32 sums in another order"
    assert tomllib.loads((root / name / "job.toml").read_text())["parallel"]["backend"] == backend


def test_a_backend_may_change_from_one_start_to_the_next_and_the_data_may_not(root, wanted):
    copy_until(root, "changing", 4)
    found = launch(root, "torchrun", "changing", "parallel.backend=fsdp2")
    assert found["finished"]
    assert losses(root, "changing") == pytest.approx(wanted, rel=1e-4)


def copy_until(root, name, step):
    """Copy the finished run, back to one of its checkpoints."""
    shutil.copytree(root / "ddp", root / name)
    folder = root / name / "checkpoints"
    for later in [p for p in folder.glob("step-*") if int(p.name.removeprefix("step-")) > step]:
        shutil.rmtree(later)
    (folder / "LATEST").write_text(f"step-{step:08d}\n")
    metrics = root / name / "logs" / "metrics.jsonl"
    metrics.write_text("".join(f"{line}\n" for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= step))
    (root / name / "job.toml").write_text((root / "ddp" / "job.toml").read_text().replace(f"{root}/ddp", f"{root}/{name}"))


def alone(root, name, *overrides):
    """Train in one process; return the exit code and what was said."""
    command = [sys.executable, "-m", "negpool", "train", str(root / "job.toml"), f"run.folder={root}/{name}", *overrides]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root / "work")
    return ended.returncode, ended.stderr


def test_a_run_goes_on_with_another_job_only_if_that_is_allowed(root, wanted):
    copy_until(root, "other_job", 4)
    said = launch(root, "torchrun", "other_job", "batch.queries=8", exit_code=2)
    assert "holds a run with batch.queries=7, and this job has 8" in said and "go on with --allow-change" in said
    assert said.count("holds a run") == 1 and "DistNetworkError" not in said, "one rank refuses, and the others leave with it"
    assert alone(root, "other_job", "batch.queries=8", "--allow-change")[0] == 0
    assert len(losses(root, "other_job")) == 8


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("2", "the job asks for parallel.backend='zero2', and accelerate's configuration for 'fsdp2'; take parallel.backend out"),
        ("1", "accelerate's configuration asks for version 1 of FSDP; set fsdp_config: fsdp_version: 2"),
    ],
)
def test_a_launcher_and_a_job_that_disagree_are_refused(root, monkeypatch, version, sentence):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    code, said = alone(root, "refused", "parallel.backend=zero2")
    assert code == 2 and "Traceback" not in said
    assert sentence in said


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not a readable JSON file of settings"),
        ('{"zero_optimization": {"stage": 3}}', 'asks for stage 3 of ZeRO; set parallel.backend="zero3", or leave it out'),
        (
            '{"gradient_clipping": 1}',
            "sets gradient_clipping, which the job decides; remove it",
        ),
    ],
)
def test_settings_of_deepspeed_that_the_job_decides_are_refused(tmp_path, content, sentence):
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(InputError, match=sentence):  # when the job is read
        ParallelSettings(backend="zero2", deepspeed=tmp_path / "own.json")
