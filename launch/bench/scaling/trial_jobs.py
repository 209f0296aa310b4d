"""Trials as jobs of Slurm, each of exactly its size, one after the other, so that they do not share the network.

All are submitted at once where the site allows that many. A job leaves its report in a folder that all nodes see, so the next
start of the same command finds what ran while nobody waited for it. By Ctrl-C the jobs that wait or work are cancelled.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.bench.scaling.trials import Trial
from launch.counted import counted
from launch.jobfile import Jobs
from launch.output import messages
from launch.ranks import answer_in
from launch.submit import BATCH_FILES, ask_slurm, check_options, check_slurm, sbatch, seconds_of
from trainer.errors import InputError
from trainer.handoff.manifest import write_atomically

SCRIPT = BATCH_FILES / "scaling.sbatch"
POLL_S = 2.0
LATE_S = 20.0  # that a shared folder may take to show what another node wrote


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What each job asks of a cluster, beside its nodes."""

    gpus_per_node: int  # 0: ranks on cores, as many on a node as section launch says
    cpus_per_rank: int
    partition: str | None  # None: the cluster's default
    time: str | None  # limit, as Slurm writes it; None: the partition's
    options: tuple[str, ...]  # any others of sbatch

    def __post_init__(self) -> None:
        check_options(self.options)
        if self.time is not None:
            seconds_of(self.time)

    def ranks_per_node(self, jobs: Jobs) -> int:
        """Return the ranks of a full node."""
        return self.gpus_per_node or jobs.launch.train_ranks


def nodes_of(ranks: int, per_node: int) -> int:
    """Return how many nodes a number of ranks fills; below one node it is a part of it. Raises InputError for a broken number."""
    if ranks <= per_node:
        return 1
    if ranks % per_node:
        near = ranks // per_node * per_node
        raise InputError(
            f"--ranks {ranks} cannot be divided by {per_node} ranks on a node; the nearest that can are {near} and "
            f"{near + per_node}; --gpus-per-node, or launch.train_ranks without GPUs, sets the ranks of a node"
        )
    return ranks // per_node


def refuse_missing_nodes(ranks: Sequence[int], jobs: Jobs, allocation: Allocation) -> None:
    """Raise InputError, with what fits, where no partition has the nodes for the largest size. ranks: ascending."""
    check_slurm(allocation.partition)
    per_node = allocation.ranks_per_node(jobs)
    cpus = min(ranks[-1], per_node) * allocation.cpus_per_rank
    of = [] if allocation.partition is None else [f"--partition={allocation.partition}"]
    lines = [line.split("|") for line in ask_slurm("sinfo", "-h", "-N", *of, "-o", "%N|%c|%G|%P").splitlines()]
    nodes: dict[str, set[str]] = {}  # that are large enough, by partition
    for node, cores, resources, partition in lines:
        if of or partition.endswith("*"):
            fits = int(cores) >= cpus and _gpus_in(resources) >= min(ranks[-1], allocation.gpus_per_node)
            nodes.setdefault(partition.rstrip("*"), set()).update([node] if fits else [])
    most = max(map(len, nodes.values()), default=0)
    if nodes and nodes_of(ranks[-1], per_node) > most:
        fit = [each for each in ranks if nodes_of(each, per_node) <= most]
        gpus = f" and {counted(allocation.gpus_per_node, 'GPU')}" if allocation.gpus_per_node else ""
        raise InputError(
            f"--ranks {ranks[-1]} needs {counted(nodes_of(ranks[-1], per_node), 'node')} of {counted(cpus, 'core')}{gpus}, and "
            f"partition {', '.join(sorted(nodes))} has {most} such; "
            + (f"--ranks {','.join(map(str, fit))} fits" if fit else "set --gpus-per-node or --cpus-per-rank lower")
        )


def _gpus_in(resources: str) -> int:
    """Return the GPUs of a node, as sinfo names its resources: (null), gpu:8, gpu:h100:8(S:0-1),nvme:1."""
    parts = [part.partition("(")[0].split(":") for part in resources.split(",")]
    return sum(int(part[-1]) for part in parts if part[0] == "gpu" and part[-1].isdecimal())


def by_slurm(
    trials: Sequence[Trial], arguments: dict[str, Any], worker: str, jobs: Jobs, allocation: Allocation, folder: Path
) -> Generator[tuple[Trial, dict[str, Any] | str], None, None]:
    """Yield each trial with its result, or with the sentence of a failure; the later rounds of a size that failed are left out.

    worker: the module whose ranks measure. folder: seen by all nodes.
    """
    queue = _Queue(folder / "slurm", allocation, allocation.ranks_per_node(jobs))
    waiting, failed = list(trials), set()
    try:
        while waiting:
            queue.submit(waiting, worker, arguments)
            for trial in queue.ended(waiting):
                waiting.remove(trial)
                if (trial.ranks, trial.queries) in failed:
                    continue
                found = queue.result_of(trial)
                if isinstance(found, str):
                    failed.add((trial.ranks, trial.queries))
                    queue.cancel([each for each in waiting if (each.ranks, each.queries) in failed])
                yield trial, found
            time.sleep(POLL_S if waiting else 0)
    finally:
        queue.cancel(waiting)


class _Queue:
    """Jobs that were submitted for a folder of trials, by this process or by one before it."""

    def __init__(self, folder: Path, allocation: Allocation, ranks_per_node: int):
        self._folder, self._allocation, self._ranks_per_node = folder, allocation, ranks_per_node
        self._told: dict[Trial, str] = {}
        with contextlib.suppress(OSError, ValueError):
            self._numbers: dict[str, int] = json.loads((folder / "jobs.json").read_text())
            return
        self._numbers = {}

    def submit(self, trials: Sequence[Trial], worker: str, arguments: dict[str, Any]) -> None:
        """Submit those that are not; where Slurm takes no more for now, the others have their turn when one has ended."""
        for trial in trials:
            if trial.name in self._numbers:
                continue
            nodes = nodes_of(trial.ranks, self._ranks_per_node)
            start = {"worker": worker, "ranks_per_node": trial.ranks // nodes, "report": str(self._report(trial).absolute())}
            start |= {"arguments": arguments | {"queries": trial.queries}}
            write_atomically(self._file(trial), json.dumps(start, indent=1) + "\n")
            self._report(trial).unlink(missing_ok=True)
            try:
                number, _ = sbatch({"NEGPOOL_PYTHON": sys.executable}, self._command(trial, nodes))
            except InputError:
                if any(other.name in self._numbers for other in trials):
                    return
                raise
            self._numbers[trial.name] = int(number.split(";")[0])  # with several clusters, their name follows
            self._write_numbers()

    def ended(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return those whose jobs wait and work no more."""
        asked = subprocess.run(["squeue", "-h", "--me", "-o", "%i %T (%r)"], capture_output=True, text=True)
        if asked.returncode:  # a busy controller: the next time
            return []
        states = dict(line.split(" ", 1) for line in asked.stdout.splitlines())
        submitted = [trial for trial in trials if trial.name in self._numbers]
        for trial in submitted:
            state = states.get(str(self._numbers[trial.name]), "ended")
            if state != self._told.get(trial):
                self._told[trial] = state
                messages().print(f"[dim]Slurm job {self._numbers[trial.name]}: {trial}: {state.lower()}[/dim]")
        return [trial for trial in submitted if self._told[trial] == "ended"]

    def result_of(self, trial: Trial) -> dict[str, Any] | str:
        """Return what an ended job measured, or a sentence with the path of its log; raises InputError for what it refused."""
        report, number = self._report(trial), self._numbers.pop(trial.name)
        deadline = time.monotonic() + LATE_S
        log = self._folder / f"{trial.name}-{number}.out"
        while not report.exists() and _ended_well(number) and time.monotonic() < deadline:
            time.sleep(1)
        self._write_numbers()
        found = answer_in(report)
        report.unlink(missing_ok=True)
        return f"Slurm job {number} ended without a result; its log is {log}" if found is None else found

    def cancel(self, trials: Sequence[Trial]) -> None:
        """Cancel the jobs of trials."""
        numbers = [str(self._numbers.pop(trial.name)) for trial in trials if trial.name in self._numbers]
        if numbers:
            subprocess.run(["scancel", *numbers])
            self._write_numbers()

    def _command(self, trial: Trial, nodes: int) -> list[str]:
        on_node, of = trial.ranks // nodes, self._allocation
        words = [f"--nodes={nodes}", f"--cpus-per-task={on_node * of.cpus_per_rank}"]
        words += [f"--gpus-per-node={on_node}"] if of.gpus_per_node else []
        words += [f"--partition={of.partition}"] if of.partition else []
        words += [f"--time={of.time}"] if of.time else []
        logs = str(self._folder.absolute()).replace("%", "%%")  # Slurm's patterns begin with %
        output = f"--output={logs}/{trial.name}-%j.out"
        return ["sbatch", "--parsable", output, *words, *of.options, str(SCRIPT), str(self._file(trial).absolute())]

    def _file(self, trial: Trial) -> Path:
        return self._folder / f"{trial.name}.json"

    def _report(self, trial: Trial) -> Path:
        return self._folder / f"{trial.name}.report.json"

    def _write_numbers(self) -> None:
        write_atomically(self._folder / "jobs.json", json.dumps(self._numbers))


def _ended_well(number: int) -> bool:
    """Tell whether a job is known to have ended without an error, so that its report must come."""
    shown = subprocess.run(["scontrol", "show", "job", "-o", str(number)], capture_output=True, text=True).stdout
    return "JobState=COMPLETED" in shown
