"""One incarnation of a side at a time: locks, numbers, and what a replaced one may still do."""

import os
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest

from trainer.errors import InputError, RunInUse
from trainer.handoff.claim import claim_side, refuse_live
from trainer.handoff.manifest import publish_version, read_latest, versions
from trainer.handoff.negatives import publish_negatives
from trainer.metrics import Status, read_status


@pytest.fixture
def slurm(monkeypatch):
    """Be a start of a job of Slurm's."""

    def start(job: int, restarts: int) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        if restarts:
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        else:
            monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return start


def write_a_file(folder):
    (folder / "a").write_text("a")


def test_starts_are_numbered_and_a_live_one_is_not_joined(tmp_path, slurm):
    first = claim_side(tmp_path, "trainer")
    holder = rf"^another trainer \(process {os.getpid()} on .+, for \d seconds?\) is at work in .*; wait for it, stop it, or set"
    with pytest.raises(RunInUse, match=holder):
        claim_side(tmp_path, "trainer")
    with pytest.raises(RunInUse, match=holder):
        refuse_live(tmp_path, "miner", "trainer")
    assert claim_side(tmp_path, "miner").number == 1, "each side has its own"
    first.check()
    first.release()
    refuse_live(tmp_path, "trainer")
    assert claim_side(tmp_path, "trainer").number == 2


def test_how_long_a_holder_is_at_work_is_said_in_words(tmp_path):
    claim = claim_side(tmp_path, "launch")
    told = []
    for age_s in (1, 119, 7200):
        os.utime(tmp_path / "status" / "launch.claim.json", (time.time() - age_s,) * 2)
        with pytest.raises(RunInUse) as error:
            refuse_live(tmp_path, "launch")
        told.append(re.search("another negpool run .* for (.*)\\) is at work", str(error.value))[1])
    claim.release()
    assert told == ["1 second", "2 minutes", "2 hours"]


def test_another_job_and_a_second_process_of_the_same_start_are_refused(tmp_path, slurm):
    slurm(12, 1)
    held = claim_side(tmp_path, "trainer")
    for job, restarts in ((13, 0), (13, 2), (12, 1), (12, 0)):
        slurm(job, restarts)
        with pytest.raises(RunInUse, match=r"another trainer \(Slurm job 12, "):
            claim_side(tmp_path, "trainer")
    held.check()


def test_a_job_that_is_started_again_takes_the_place_of_what_outlived_its_node(tmp_path, slurm):
    slurm(12, 0)
    outlived = claim_side(tmp_path, "trainer")
    slurm(12, 1)
    again = claim_side(tmp_path, "trainer")
    assert (outlived.number, again.number) == (1, 2)
    again.check()
    with pytest.raises(RunInUse, match="went over from start 1 of its trainer to start 2"):
        outlived.check()
    outlived.release()  # must not open the door that the new start has locked
    slurm(13, 0)
    with pytest.raises(RunInUse, match="Slurm job 12"):
        claim_side(tmp_path, "trainer")


def test_what_outlived_its_start_publishes_nothing(tmp_path, slurm):
    slurm(12, 0)
    outlived = claim_side(tmp_path, "miner")
    numbers = np.arange(3)
    publish_negatives(tmp_path, 0, numbers, numbers[:2], np.zeros(2), {}, outlived.check)
    slurm(12, 1)
    again = claim_side(tmp_path, "miner")
    other_rank = pickle.loads(pickle.dumps(outlived))
    for stale in (outlived, other_rank):
        with pytest.raises(RunInUse):
            publish_negatives(tmp_path, 1, numbers, numbers[:2], np.zeros(2), {}, stale.check)
        with pytest.raises(RunInUse):
            publish_version(tmp_path / "checkpoints" / "step-1", write_a_file, {}, stale.check)
        with pytest.raises(RunInUse):
            Status(tmp_path, "miner", stale.check).update(phase="searching")
    assert [folder.name for folder in versions(tmp_path / "negatives")] == ["v000000"]
    assert read_latest(tmp_path / "negatives") == "v000000"
    assert not list((tmp_path / "checkpoints").iterdir()) and read_status(tmp_path, "miner") == {}
    publish_negatives(tmp_path, 1, numbers, numbers[:2], np.zeros(2), {}, again.check)
    assert read_latest(tmp_path / "negatives") == "v000001"


def test_a_folder_that_cannot_be_written_is_one_sentence():
    with pytest.raises(InputError, match="cannot write /proc/run"):
        claim_side(Path("/proc/run"), "trainer")
