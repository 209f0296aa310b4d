"""The main job with real processes: torchrun ranks, an MPI miner, real kills. With the schedule of negatives fixed, every
run ends with the same parameters to the bit, however often it was killed or stopped on the way."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.disk import fill, small_disk
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.errors import EXIT_FAILED, EXIT_MUST_NOT_GO_ON
from trainer.handoff.manifest import open_version, versions
from trainer.metrics import read_status

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 240
NUM_STEPS = 240

JOB = """
[run]
folder = "{root}/{name}"
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
steps = {steps}
lr = 1e-3
[checkpoint]
every_steps = 40
[negatives]
per_query = 2
schedule = [{{checkpoint = 40, step = 80}}, {{checkpoint = 120, step = 160}}]
[search]
top_k = 20
[sample]
num_negatives = 6
[filter]
relative_margin = 0.01
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("system")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder", dropout=0.1)
    return folder


def write_job(root: Path, name: str) -> Path:
    job = root / f"{name}.toml"
    job.write_text(JOB.format(root=root, name=name, steps=NUM_STEPS))
    return job


def start(root: Path, name: str) -> subprocess.Popen:
    job = write_job(root, name)
    return subprocess.Popen(
        [sys.executable, "-m", "negpool", "run", str(job), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, exit_code: int = 0) -> tuple[dict, str]:
    """Wait for the end and return the JSON object and what was said to the person."""
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        pytest.fail(f"the run did not end: {process.communicate()[1][-2000:]}")
    assert process.returncode == exit_code, err[-3000:]
    assert "Traceback" not in err
    return json.loads(out), err


def wait_until(process: subprocess.Popen, what, reason: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not what():
        assert process.poll() is None, f"ended before {reason}: {process.communicate()[1][-3000:]}"
        assert time.monotonic() < deadline, f"never: {reason}"
        time.sleep(0.02)


def step_of(run: Path) -> int:
    return read_status(run, "trainer").get("step", 0)


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / f"step-{NUM_STEPS:08d}" / "encoder" / "model.safetensors").read_bytes()


def state(run: Path) -> bytes:
    folder = run / "checkpoints" / f"step-{NUM_STEPS:08d}" / "state"
    return b"".join(path.read_bytes() for path in sorted(folder.glob("part-*")))


def is_whole(run: Path) -> bool:
    """Verify every version in the run folder; raises if one is torn."""
    found = [*versions(run / "checkpoints"), *versions(run / "negatives")]
    return bool([open_version(folder) for folder in found])


@pytest.fixture(scope="module")
def undisturbed(root):
    results, said = finish(start(root, "undisturbed"))
    run = root / "undisturbed"
    assert results["finished"] and results["versions_swapped"] == 2
    assert "negatives v2 from the miner swapped in" in said
    assert is_whole(run)
    return run


def test_a_run_leaves_what_it_promises(undisturbed):
    results = json.loads((undisturbed / "results.json").read_text())
    assert results["num_test_queries"] == 8
    for name in ("bm25", "untrained", "trained"):
        assert results[name].keys() == {"ndcg@10", "mrr@10", "recall@10", "recall@100"}
    assert results["trained"] != results["untrained"]
    lines = [json.loads(line) for line in (undisturbed / "logs" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, NUM_STEPS + 1))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-40:]) < 0.8 * sum(losses[:40]), "it learns"
    swaps = [(line["step"], line["negatives/version"]) for line in lines if line.get("event") == "negatives swapped"]
    assert swaps == [(0, 0), (80, 1), (160, 2)]
    assert json.loads((undisturbed / "environment.json").read_text())["libraries"]["torch"]


def test_a_trainer_that_is_killed_ends_with_the_same_parameters(root, undisturbed):
    process, run = start(root, "trainer_killed"), root / "trainer_killed"
    wait_until(process, lambda: step_of(run) > 90, "step 90")
    os.kill(read_status(run, "trainer")["pid"], signal.SIGKILL)
    _, said = finish(process)
    assert "the trainer ended with code" in said and "started again, from the checkpoint step-" in said
    assert is_whole(run)
    assert weights(run) == weights(undisturbed) and state(run) == state(undisturbed)


def test_a_miner_that_is_killed_ends_with_the_same_parameters(root, undisturbed):
    process, run = start(root, "miner_killed"), root / "miner_killed"
    wait_until(process, lambda: (run / "negatives" / "v000000").exists(), "version 0")
    os.kill(read_status(run, "miner")["pid"], signal.SIGKILL)
    _, said = finish(process)
    assert "the miner ended with code" in said and "training goes on" in said
    assert is_whole(run)
    assert weights(run) == weights(undisturbed)


def test_ctrl_c_saves_and_the_same_command_goes_on(root, undisturbed):
    process, run = start(root, "interrupted"), root / "interrupted"
    wait_until(process, lambda: step_of(run) > 0, "a step")
    second = start(root, "interrupted")
    _, told = second.communicate(timeout=TIMEOUT_S)
    holder = rf"another negpool run \(process {process.pid} on .*, for .*\)"
    assert second.returncode == 2 and re.fullmatch(rf"negpool: {holder} is at work in {run}; wait for .*\n", told), told
    wait_until(process, lambda: step_of(run) > 100, "step 100")
    process.send_signal(signal.SIGINT)
    stopped, said = finish(process, exit_code=75)
    assert not stopped["finished"] and stopped["step"] > 100
    assert f"To go on: python -m negpool run {root}/interrupted.toml --json" in said
    for side in ("trainer", "miner"):
        with pytest.raises(ProcessLookupError):
            os.kill(read_status(run, side)["pid"], 0)
    _, said_again = finish(start(root, "interrupted"))
    assert re.findall(r"negatives v(\d) from .* swapped in", said + said_again) == ["0", "1", "2"], "each is told once"
    assert weights(run) == weights(undisturbed) and state(run) == state(undisturbed)


def test_a_finished_run_is_not_trained_again(root, undisturbed):
    before = (undisturbed / "logs" / "metrics.jsonl").read_text()
    results, _ = finish(start(root, "undisturbed"))
    assert results["versions_swapped"] == 2
    assert (undisturbed / "logs" / "metrics.jsonl").read_text() == before


def test_input_that_cannot_be_used_is_one_sentence_and_exit_2(root, undisturbed):
    cases = {
        ("launch.train_ranks=9",): "batch.queries=7 is less than the 9 ranks",
        ("data.path=/nowhere", f"run.folder={root}/other"): "there is no data set in /nowhere",
        ("model.name=/nowhere", f"run.folder={root}/other"): "model.name='/nowhere' is not a model that can be loaded",
        ("optim.lrr=1",): "unknown key optim.lrr; did you mean lr?",
        ("optim.lr=0.5",): "holds a run with optim.lr=0.001, and this job has 0.5",
        ("run.folder=/proc/run",): "cannot write /proc/run",
    }
    for overrides, sentence in cases.items():
        command = [sys.executable, "-m", "negpool", "run", str(root / "undisturbed.toml"), *overrides]
        found = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert found.returncode == 2, (overrides, found.stderr)
        assert sentence in found.stderr and "Traceback" not in found.stderr
        assert len(found.stderr.strip().splitlines()) <= 2, found.stderr  # one that says what is read, one that refuses


@pytest.mark.parametrize("fills", ["by itself", "from outside"])
def test_a_full_disk_is_waited_for_then_one_sentence_and_leaves_no_torn_version(root, tmp_path, fills):
    disk, run = tmp_path / "disk", tmp_path / "disk" / "run"
    impatient = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests' / 'system' / 'faulty'}:{ROOT}"}
    with small_disk(disk, "900k" if fills == "by itself" else "4m"):
        command = [
            sys.executable,
            "-m",
            "negpool",
            "run",
            str(write_job(root, "full")),
            f"run.folder={run}",
            "launch.max_restarts=1",
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=impatient)
        if fills == "from outside":
            wait_until(process, lambda: step_of(run) > 5, "it does not train")
            fill(disk)
        said = process.communicate(timeout=TIMEOUT_S)[1]
        log = (run / "logs" / "trainer.log").read_text()
        # Started again, and twice at the same step is enough; where no start gets as far, the limit ends it.
        assert process.returncode in (EXIT_FAILED, EXIT_MUST_NOT_GO_ON) and "started again" in said, said + log
        assert "no room left on the disk for" in said.splitlines()[-1] and "Traceback" not in said, said + log
        assert not any(f'File "{ROOT}/{package}' in log for package in ("launch", "trainer")), log  # torchrun's own traceback may
        assert is_whole(run)
