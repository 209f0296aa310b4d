"""`negpool bench scaling --slurm` on a real cluster of four nodes: a job for each size, one after the other."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from launch.bench.scaling.trial_jobs import Allocation, refuse_missing_nodes
from launch.jobfile import read_job
from tests.launch.test_scaling import COMMAND, ROOT
from tests.slurm.cluster import Cluster, wait_until, why_not
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.errors import InputError

REASON = why_not()
# Beside the other cluster's trainings its ranks would take four times as long.
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.alone]

TIMEOUT_S = 400
JOB = """
[run]
folder = "{root}/runs/none"
[data]
path = "{root}/data"
cache = "{root}/cache"
[model]
name = "{root}/encoder"
[batch]
queries = 8
[chunk]
tokens = 64
[negatives]
per_query = 1
when_stale = "wait"
[launch]
train_ranks = 1
"""


@pytest.fixture(scope="module")
def root():
    folder = Path(tempfile.mkdtemp(prefix="negpool-"))  # sockets need a short path
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder")
    (folder / "job.toml").write_text(JOB.format(root=folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster(root):
    cluster = Cluster(root / "slurm", 4, first_job=301)
    cluster.env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NEGPOOL_TEST_TRIALS": str(root / "trials.txt")}
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def command(root, ranks: str, out: str, *words: str, start: tuple[str, ...] = ("-c", COMMAND)) -> list[str]:
    """Return the words of the command with a stand-in for the ranks, or of negpool itself."""
    words = (*words, "--out", f"{root}/{out}", "--cpus-per-rank", "1", "--time", "10", "--rounds", "1", "--json")
    return [sys.executable, *start, "bench", "scaling", f"{root}/job.toml", "--slurm", "--mode", "weak", "--ranks", ranks, *words]


def run(cluster, words: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        words, env=cluster.env | environment, cwd=cluster.folder, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def test_each_size_is_a_job_of_its_own_nodes(cluster, root):
    words = command(root, "1,2,4", "real", "--warm-up", "1", "--steps", "2", start=("-m", "negpool"))
    done = run(cluster, words)
    assert done.returncode == 0, done.stderr + "".join(file.read_text() for file in (root / "real" / "slurm").glob("*.out"))
    rows = json.loads(done.stdout)["sizes"]["weak"]
    assert [(row["ranks"], row["nodes"], row["queries"]) for row in rows] == [(1, 1, 8), (2, 2, 16), (4, 4, 32)]
    assert all(row["step_s"] > 0 and row["slowest_host"] in cluster.nodes for row in rows)
    jobs = [cluster.job(int(file.stem.rpartition("-")[2])) for file in sorted((root / "real" / "slurm").glob("*.out"))]
    assert [(job["NumNodes"], job["JobState"], job["Requeue"]) for job in jobs] == [
        ("1", "COMPLETED", "0"),
        ("2", "COMPLETED", "0"),
        ("4", "COMPLETED", "0"),
    ]
    assert all(before["EndTime"] <= after["StartTime"] for before, after in pairwise(jobs))


def test_a_command_may_be_killed_or_stopped_and_a_job_may_fail(cluster, root):
    killed = subprocess.Popen(command(root, "1", "cut"), env=cluster.env, cwd=cluster.folder, stdout=-3, stderr=-3)
    wait_until((root / "cut" / "slurm" / "jobs.json").exists, "a job", TIMEOUT_S)
    killed.kill()
    killed.wait()
    wait_until(lambda: not cluster.run("squeue", "-h"), "the end of the job that nobody waits for", TIMEOUT_S)
    words, trials = command(root, "1,2,4", "cut"), root / "trials.txt"
    slow = cluster.env | {"NEGPOOL_TEST_SLOW": "2"}
    stopped = subprocess.Popen(words, env=slow, cwd=cluster.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: trials.read_text() == "1 8\n2 16\n", "the second size, and not the first again", TIMEOUT_S)
    except AssertionError:
        stopped.kill()
        raise AssertionError(stopped.communicate()) from None
    assert len(cluster.run("squeue", "-h").splitlines()) == 2, "the third waits for the second"
    stopped.send_signal(signal.SIGINT)
    said = stopped.communicate(timeout=TIMEOUT_S)
    assert stopped.returncode == 75 and "1 trial kept in" in said[1] and "Traceback" not in said[1], said
    wait_until(lambda: not cluster.run("squeue", "-h"), "that the jobs are gone")
    again = run(cluster, words, NEGPOOL_TEST_DEAD="2")
    found = json.loads(again.stdout)
    assert again.returncode == 1 and [row["ranks"] for row in found["sizes"]["weak"]] == [1, 4], again.stderr
    (failed,) = found["failed"]
    log = Path(failed["why"].rpartition("its log is ")[2])
    assert "ended without a result" in failed["why"] and "this size dies" in log.read_text()
    assert trials.read_text().splitlines()[2:] == ["2 16", "4 32"]


def test_nodes_that_the_cluster_lacks_are_refused(cluster, root, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    jobs = read_job(root / "job.toml", [])
    asked = Allocation(gpus_per_node=0, cpus_per_rank=1, partition=None, time=None, options=())
    with pytest.raises(InputError, match="--ranks 8 needs 8 nodes of 1 core, and partition main has 4 such; --ranks 1,4 fits"):
        refuse_missing_nodes((1, 4, 8), jobs, asked)
    with pytest.raises(InputError, match="needs 6 nodes of 2 cores and 2 GPUs, and partition urgent has 4 such; --ranks 8 fits"):
        refuse_missing_nodes((8, 12), jobs, replace(asked, gpus_per_node=2, partition="urgent"))
    with pytest.raises(InputError, match="this cluster has no partition fast; it has main, urgent"):
        refuse_missing_nodes((2, 4), jobs, replace(asked, partition="fast"))
