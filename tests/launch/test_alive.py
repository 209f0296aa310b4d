"""What is said of a side that is no longer there, by what it and its supervisor left behind."""

import json
import os
import subprocess
import sys
import time

import pytest

from launch.alive import gone
from launch.main_job import _saved_step
from launch.status import describe_run, run_status
from trainer.handoff.claim import claim_side
from trainer.handoff.manifest import write_latest
from trainer.metrics import Status, read_status

SIDE = """
import os, sys
from pathlib import Path
from trainer.handoff.claim import claim_side
from trainer.handoff.manifest import write_latest
from trainer.metrics import Status
claim = claim_side(Path(sys.argv[1]), "trainer")
Status(Path(sys.argv[1]), "trainer").update(phase="training", step=7, num_steps=9)
print("at work", flush=True)
sys.stdin.read()
"""


def silent(run, side, seconds):
    """Make a side's last word so old."""
    os.utime(run / "status" / f"{side}.json", (time.time() - seconds,) * 2)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "job.toml").write_text("")
    return tmp_path


def test_a_trainer_that_was_killed_is_not_alive_since_its_last_word(run):
    process = subprocess.Popen([sys.executable, "-c", SIDE, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    silent(run, "trainer", 3600)
    assert gone(run, "trainer", read_status(run, "trainer")) is None, "its lock is held: it is silent, and alive"
    process.kill()
    process.communicate()
    found = run_status(run)
    end = found["trainer"]["not_alive"]
    assert end["since"] == pytest.approx(time.time() - 3600, abs=60)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end["since"]))
    told = f"not alive since {since}: it left no word; it was killed, or its machine went down"
    assert told in describe_run(found).splitlines()[1]


@pytest.mark.parametrize("phase", ["finished", "stopped", "refused", "must not go on"])
def test_who_has_said_how_it_ended_is_not_missed(run, phase):
    Status(run, "trainer").update(phase=phase, error="no such data")
    silent(run, "trainer", 3600)
    assert gone(run, "trainer", read_status(run, "trainer")) is None


def test_the_last_reason_is_told(run):
    Status(run, "trainer").update(phase="failed", error="no room left on the disk")
    silent(run, "trainer", 3600)
    assert gone(run, "trainer", read_status(run, "trainer"))["reason"] == "no room left on the disk"


def test_a_side_that_its_supervisor_starts_again_is_awaited(run):
    Status(run, "miner").update(phase="searching")
    silent(run, "miner", 60)
    claim = claim_side(run, "launch")
    assert gone(run, "miner", read_status(run, "miner")) is None
    claim.release()
    assert gone(run, "miner", read_status(run, "miner")) is not None


def test_another_machine_may_be_silent_for_longer(run):
    (run / "status").mkdir()
    (run / "status" / "trainer.json").write_text(json.dumps({"phase": "training", "host": "another"}))
    silent(run, "trainer", 300)
    assert gone(run, "trainer", read_status(run, "trainer")) is None
    silent(run, "trainer", 900)
    assert gone(run, "trainer", read_status(run, "trainer")) is not None
    assert gone(run, "miner", {}) is None, "it was never started"


def test_a_run_that_is_stopped_while_it_starts_tells_the_step_it_goes_on_from(run):
    assert _saved_step(run) == 0
    Status(run, "trainer").update(phase="preparing", step=0)
    write_latest(run / "checkpoints", "step-00000023")
    assert _saved_step(run) == 23
    Status(run, "trainer").update(phase="training", step=40)
    assert _saved_step(run) == 23, "one that was ended at once has not saved"
