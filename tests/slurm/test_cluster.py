"""Training and mining on a real Slurm cluster with the batch files that users submit, disturbed in every way that clusters know.

With the schedule of negatives fixed, each run ends with the parameters of the undisturbed one, to the bit.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from launch.jobfile import read_job
from launch.submit import BATCH_FILES, Size, submit
from tests.slurm.cluster import Cluster, wait_until, why_not
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.errors import InputError, RunInUse
from trainer.handoff.manifest import open_version, versions
from trainer.metrics import read_status

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

NUM_STEPS = 60
SWAPS = [(0, 0), (20, 1), (40, 2)]  # (step, version)
TIMEOUT_S = 400
JOB = """
[run]
trackers = []
[data]
path = "{root}/data"
cache = "{root}/cache"
[model]
name = "{root}/encoder"
[batch]
queries = 8
[chunk]
tokens = 48
keep_graphs = 1
[loss]
learn_temperature = true
[optim]
steps = {steps}
lr = 1e-3
[checkpoint]
every_steps = 10
keep = 3
[negatives]
per_query = 2
schedule = [{{checkpoint = 10, step = 20}}, {{checkpoint = 30, step = 40}}]
[search]
top_k = 20
[sample]
num_negatives = 6
[mine]
poll_s = 0.5
"""
# Ranks on cores, as many as section launch says; one run has its nodes for itself.
SIZE = Size(
    nodes=2,
    gpus_per_node=0,
    miner_nodes=1,
    cpus_per_rank=1,
    partition=None,
    time=None,
    save_seconds=30,
    max_restarts=1,  # without a new checkpoint; the stories have more, and one for each
    together=False,
    options=("--exclusive",),
)


@dataclass
class Run:
    """A run on the cluster."""

    cluster: Cluster
    job_file: Path
    folder: Path
    train: int = 0  # numbers of Slurm's jobs
    mine: int = 0
    late: int = 0  # a miner after the end

    def submit(self, size: Size = SIZE, *overrides: str) -> "Run":
        jobs = submit(read_job(self.job_file, [f"run.folder={self.folder}", *overrides]), size, dry_run=False)["jobs"]
        self.train, self.mine = (jobs.get("train_and_mine" if size.together else side, 0) for side in ("train", "mine"))
        return self

    def slow(self, seconds: float) -> None:
        """Let every step take longer from now on."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "slow").write_text(str(seconds))

    def fast(self) -> None:
        (self.folder / "slow").unlink(missing_ok=True)

    def restarts(self) -> int:
        return int(self.cluster.job(self.train)["Restarts"])

    def nodes(self) -> list[str]:
        return self.cluster.run("scontrol", "show", "hostnames", self.cluster.job(self.train)["NodeList"]).split()

    def at_step(self, step: int) -> None:
        self.until(lambda: read_status(self.folder, "trainer").get("step", 0) >= step, f"step {step}")

    def again(self, times: int) -> None:
        """Wait until the trainers have been started again so often, and work."""
        self.until(lambda: self.restarts() == times, f"restart {times}")
        self.until(lambda: self.cluster.job(self.train)["JobState"] == "RUNNING", f"running again ({times})")

    def finished(self) -> "Run":
        """Wait for the end of both jobs."""
        for number in (self.train, self.mine):
            self.until(lambda n=number: self.cluster.job(n)["JobState"] == "COMPLETED", f"the end of job {number}")
        return self

    def until(self, is_so, what: str) -> None:
        try:
            wait_until(lambda: self.cluster.is_over or is_so(), what, TIMEOUT_S, poll_s=0.5)
            assert not self.cluster.is_over, "the tests have ended before"
        except AssertionError as error:
            told = [self.log(n)[-3000:] + "\n" + self.cluster.told_about(n) for n in (self.train, self.mine) if n]
            raise AssertionError("\n".join([str(error), *told, self.cluster.run("squeue", "--states=all")])) from None

    def log(self, number: int | None = None) -> str:
        files = sorted((self.folder / "logs").glob(f"slurm-*-{number or self.train}.out"))
        return "\n".join(file.read_text() for file in files)


@pytest.fixture(scope="module")
def root():
    folder = Path(tempfile.mkdtemp(prefix="negpool-"))  # sockets need a short path
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder", dropout=0.1)
    (folder / "job.toml").write_text(JOB.format(root=folder, steps=NUM_STEPS))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster(root):
    cluster, before = Cluster(root / "slurm", 11), dict(os.environ)
    slow = str(Path(__file__).parent / "slow")
    os.environ |= {"SLURM_CONF": cluster.env["SLURM_CONF"], "PYTHONPATH": slow, "OMP_NUM_THREADS": "1"}
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def runs(root, cluster):
    """Start all runs, four at a time, that which only waits among the first; each comes as what is still to happen."""
    stories = (too_short, undisturbed, limited, preempted, crashed, outlived)
    with ThreadPoolExecutor(4) as pool:
        yield {s.__name__: pool.submit(s, Run(cluster, root / "job.toml", root / s.__name__)) for s in stories}
        cluster.is_over = True
        pool.shutdown(cancel_futures=True)


def undisturbed(run: Run) -> Run:
    """Train and mine with GPUs: two ranks on each of two nodes, two miners on a third. Then a miner is started again."""
    run.submit(replace(SIZE, gpus_per_node=2, options=())).finished()
    run.late = mine_late(run)
    return run


def mine_late(run: Run) -> int:
    """Start a miner of a finished run that begins when its script has looked for the trainers twice; return its job."""
    slow_python, looks = run.folder / "python", run.folder / "looks"
    # Of the looks that are left each waits half a minute.
    wait = f"[[ $3 == mine ]] && until [[ $(wc -l <{looks}) -ge 3 ]]; do command sleep 0.2; done"
    slow_python.write_text(f'#!/bin/bash\n{wait}; exec {sys.executable} "$@"\n')
    slow_python.chmod(0o755)
    looks.touch()
    # A function of the environment takes the place of the command.
    sleep = f"() {{ echo >>{looks}; command sleep $(($(wc -l <{looks}) > 3 ? 30 : 1)); }}"
    environment = run.cluster.env | {"NEGPOOL_PYTHON": str(slow_python), "BASH_FUNC_sleep%%": sleep}
    words = ["sbatch", "--parsable", f"--output={run.folder}/late.out", BATCH_FILES / "mine.sbatch", run.folder / "job.toml"]
    command = [*map(str, words), str(run.train)]
    return int(subprocess.run(command, env=environment, timeout=TIMEOUT_S, capture_output=True, text=True, check=True).stdout)


def limited(run: Run) -> Run:
    """The first start meets its time limit; of the second one a rank is killed."""
    run.slow(0.5)
    run.submit(replace(SIZE, save_seconds=60))
    run.at_step(12)
    run.slow(2)
    # Slurm looks every 30 s: of the 60 s to save, 30 or more are left when it sends the signal.
    update(run, f"EndTime={datetime.now() + timedelta(seconds=65):%Y-%m-%dT%H:%M:%S}")
    run.again(1)
    run.slow(0.5)
    update(run, "TimeLimit=60")
    at_limit = read_status(run.folder, "trainer")["step"]
    run.until(lambda: "resumed from step" in run.log(), "resumed")
    run.at_step(at_limit + 2)
    ranks_of(run, run.nodes()[1])[0].kill()
    run.again(2)
    run.fast()
    return run.finished()


def update(run: Run, change: str) -> None:
    """Change the trainers' job as it runs: how long it takes to begin depends on the machine."""
    run.cluster.run("scontrol", "update", f"JobId={run.train}", change)


def preempted(run: Run) -> Run:
    """The miner is requeued, a job of higher priority takes the trainers' nodes, and then somebody requeues them."""
    run.slow(0.5)
    run.submit()
    run.at_step(5)
    run.cluster.run("scontrol", "requeue", run.mine)
    run.at_step(12)
    nodes = ",".join(run.nodes())
    run.cluster.run("sbatch", "--partition=urgent", "-w", nodes, "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    run.again(1)
    run.at_step(24)
    run.cluster.run("scontrol", "requeue", run.train)
    run.again(2)
    run.fast()
    return run.finished()


def crashed(run: Run) -> Run:
    """A node of the trainers loses its power; later all is cancelled, and submitted again, as one job this time."""
    run.slow(0.5)
    run.submit()
    run.at_step(12)
    lost = run.nodes()[1]
    run.cluster.crash(lost)
    run.until(lambda: run.restarts() == 1, "that the loss is noticed")
    run.cluster.boot(lost)
    run.again(1)
    run.at_step(24)
    with pytest.raises(RunInUse, match=f"Slurm job {run.train} .* is at work"):
        run.submit()
    first = run.train, run.mine
    run.cluster.run("scancel", run.train)
    for number in first:  # the miner leaves by itself when its trainers are gone
        run.until(lambda n=number: run.cluster.job(n)["JobState"] == "CANCELLED", f"the end of {number}")
    assert read_status(run.folder, "trainer")["phase"] == "stopped", run.log()
    run.fast()
    return run.submit(replace(SIZE, together=True)).finished()


def outlived(run: Run) -> Run:
    """The trainers' node falls silent, and they live on there, while Slurm starts them again on another."""
    run.slow(2)
    run.submit(replace(SIZE, nodes=1), "launch.train_ranks=4")
    run.at_step(12)
    (node,) = run.nodes()
    ranks = ranks_of(run, node)
    run.cluster.silence(node)
    run.until(lambda: run.restarts() == 1, "that the silence is noticed")
    assert len(ranks) == 4 and all(is_alive(rank) for rank in ranks), "nobody outlived the start"
    run.until(lambda: not any(is_alive(rank) for rank in ranks), "that those who were left behind leave")
    assert read_status(run.folder, "trainer")["step"] < NUM_STEPS
    run.fast()
    run.finished()
    run.cluster.crash(node)
    run.cluster.boot(node)
    return run


def too_short(run: Run) -> Run:
    """The time limit comes before the first step: without a miner they wait for negatives."""
    # Slurm looks every 30 s, and sends the signal when it would be late the next time: 50 to 80 s after the start.
    size = replace(SIZE, nodes=1, miner_nodes=0, time="2", save_seconds=40)
    run.submit(size, "negatives.first_wait_s=600")
    run.until(lambda: run.cluster.job(run.train)["JobState"] == "FAILED", "that it gives up")
    return run


def ranks_of(run: Run, node: str) -> list[psutil.Process]:
    """Return the trainers' ranks of a run on a node."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        environment = process.info["environ"] or {}
        is_rank = "train" in (process.info["cmdline"] or []) and "LOCAL_RANK" in environment
        if is_rank and environment.get("SLURM_JOB_ID") == str(run.train) and environment.get("SLURMD_NODENAME") == node:
            found.append(process)
    assert found, f"no rank of job {run.train} on {node}"
    return found


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # nobody takes in a lost node's orphans
    except psutil.NoSuchProcess:
        return False


def final_bytes(run: Run) -> bytes:
    """Return the encoder, the moments and all else that a run ended with."""
    folder = run.folder / "checkpoints" / f"step-{NUM_STEPS:08d}"
    parts = sorted((folder / "state").glob("part-*"))
    assert parts
    return b"".join(path.read_bytes() for path in [folder / "encoder" / "model.safetensors", *parts])


def check_story(runs: dict[str, Future], name: str) -> Run:
    """Return a run that has gone its whole way; every version it left is whole, its swaps and its end those of the other."""
    run, other = runs[name].result(), runs["undisturbed"].result()
    for version in [*versions(run.folder / "checkpoints"), *versions(run.folder / "negatives")]:
        open_version(version)
    status = read_status(run.folder, "trainer")
    assert status["phase"] == "finished" and [tuple(swap) for swap in status["swaps"]] == SWAPS
    assert final_bytes(run) == final_bytes(other)
    return run


def test_two_nodes_train_while_a_third_mines(runs, root):
    run = check_story(runs, "undisturbed")
    assert run.restarts() == 0
    kept = json.loads((run.folder / "slurm.json").read_text())
    assert kept["jobs"] == {"train": run.train, "mine": run.mine} and "slurm/train.sbatch" in kept["commands"]["train"]
    assert len(json.loads((run.folder / "environment.json").read_text())["commit"]) >= 40
    assert "nodes" not in (run.folder / "job.toml").read_text(), "the job is the same everywhere"
    lines = [json.loads(line) for line in (run.folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, NUM_STEPS + 1))
    swaps = [(line["step"], line["negatives/version"]) for line in lines if line.get("event") == "negatives swapped"]
    assert swaps == SWAPS


def test_a_time_limit_and_a_killed_rank_change_no_bit(runs):
    run = check_story(runs, "limited")
    assert run.restarts() >= 2
    said = run.log()
    assert "resumed from step" in said and "stopped at step" in said, said[-3000:]


def test_preemption_and_requeues_of_either_job_change_no_bit(runs):
    run = check_story(runs, "preempted")
    assert run.restarts() == 2 and int(run.cluster.job(run.mine)["Restarts"]) >= 1
    assert "DUE TO PREEMPTION" in run.log() and "DUE TO JOB REQUEUE" in run.log()
    assert run.log().count("resumed from step") == 2


def test_a_crashed_node_and_a_cancelled_job_change_no_bit(runs):
    run = check_story(runs, "crashed")
    assert "resumed from step" in run.log()


def test_ranks_that_outlived_their_start_write_nothing(runs):
    run = check_story(runs, "outlived")
    claim = json.loads((run.folder / "status" / "trainer.claim.json").read_text())
    assert claim["number"] == 2 and claim["slurm_restarts"] == 1


def test_a_time_limit_that_leaves_no_time_to_save_is_said_and_ends_it(runs):
    run = runs["too_short"].result()
    assert "the time limit came before the first step; not started again: set --time higher" in run.log()
    assert run.restarts() == 1 and run.cluster.job(run.train)["ExitCode"] == "78:0"
    assert read_status(run.folder, "trainer")["phase"] == "must not go on"


def test_a_miner_that_is_started_again_after_the_end_has_time_to_see_it(runs):
    run = runs["undisturbed"].result()
    run.until(lambda: run.cluster.job(run.late)["JobState"] == "COMPLETED", "the end of the late miner")
    said = (run.folder / "late.out").read_text()
    assert "nothing more to mine: trained to step 60" in said and "CANCELLED" not in said, said


def test_what_a_cluster_cannot_run_is_refused_in_one_sentence(cluster, root):
    jobs = read_job(root / "job.toml", [f"run.folder={root}/refused"])
    with pytest.raises(InputError, match="this cluster has no partition gpu; it has main, urgent; set --partition"):
        submit(jobs, replace(SIZE, partition="gpu"), dry_run=True)
    with pytest.raises(InputError, match="Slurm refuses the job: Batch job submission failed: Invalid feature specification"):
        submit(jobs, replace(SIZE, options=("--constraint=h900",)), dry_run=False)
    assert not (root / "refused" / "slurm.json").exists()
    said = submit(jobs, replace(SIZE, together=True, options=()), dry_run=True)["slurm_says"]
    assert "to start at" in said["train_and_mine"]


def test_tasks_of_srun_train_and_evaluate_as_one_world(cluster, root):
    python, environment = [sys.executable, "-m", "negpool"], cluster.env | {"SLURM_CPUS_PER_TASK": "1"}
    alone = ["negatives.per_query=0", "negatives.schedule=[]", "optim.steps=2", "eval.split=none"]
    train = ["srun", "-N2", "-n2", *python, "train", root / "job.toml", f"run.folder={root}/tasks", *alone]
    words = [*python, "eval", root / "encoder", root / "data", "--json"]
    steps = [train, ["srun", "-n1", *words, ":", "-n1", *words]]  # of two components, the second
    started = [subprocess.Popen(list(map(str, s)), env=environment, stdout=-1, stderr=-1, text=True) for s in steps]
    (_, trained), (evaluated, _) = [process.communicate(timeout=TIMEOUT_S) for process in started]
    assert [process.returncode for process in started] == [0, 0], trained
    parts = (root / "tasks" / "checkpoints" / "step-00000002" / "state").glob("part-*")
    assert {part.name for part in parts} == {"part-00000-of-00002.safetensors"}, "one world of two, of whom one writes so little"
    assert json.loads(evaluated)["ndcg@10"] > 0, "one rank speaks"


def test_an_mpiexec_inside_a_job_stays_on_its_node(cluster, root):
    say = "import socket; from mpi4py import MPI; print(MPI.COMM_WORLD.size, socket.gethostname(), flush=True)"
    start = f"import os, sys; from launch.local import mpi_command; w = [*mpi_command(2), sys.executable, '-c', {say!r}]; "
    (root / "start.py").write_text(f"{start}os.execvp(w[0], w)")
    batch = ["sbatch", "--wait", "-N2", f"--output={root}/mpi.out", "--wrap", f"{sys.executable} {root}/start.py"]
    for command, out in ((batch, root / "mpi.out"), (["srun", "-n1", "--mpi=pmix", sys.executable, root / "start.py"], None)):
        done = subprocess.run(list(map(str, command)), env=cluster.env, capture_output=True, text=True, timeout=120)
        said = (done.stdout if out is None else out.read_text()).splitlines()
        assert len(said) == 2 and said[0] == said[1] and said[0].startswith("2 n"), (said, done.stderr)


def test_miners_that_are_each_alone_are_refused(cluster, root):
    negpool = [sys.executable, "-m", "negpool"]
    command = ["srun", "-n2", "--mpi=none", *negpool, "mine", root / "job.toml", f"run.folder={root}/alone"]
    found = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2, found.stderr
    assert "srun started 2 miners, and each is alone in its MPI world (Open MPI" in found.stderr
    assert "Traceback" not in found.stderr
