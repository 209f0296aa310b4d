"""`negpool bench scaling`: how a job's step changes with the number of ranks, measured by one start for each size and round.

Every rank has the same cores in every size: those of the machine divided by the largest number of ranks. Trials run one after the
other, on this machine or as jobs of Slurm, and each is kept as soon as it is there.
"""

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.bench.scaling.summary import summary
from launch.bench.scaling.trial_files import Conditions, TrialFolder, conditions_here
from launch.bench.scaling.trial_jobs import Allocation, by_slurm, nodes_of, refuse_missing_nodes
from launch.bench.scaling.trials import Trial, planned, queries_of, refuse_too_many
from launch.counted import counted
from launch.jobfile import Jobs
from launch.output import messages
from launch.ranks import on_ranks
from launch.shares import cores_and_gpus
from trainer.errors import InputError, MachineFailed

WORKER = "launch.bench.scaling.worker"
Outcomes = Generator[tuple[Trial, dict[str, Any] | str], None, None]  # what was measured, or the sentence of a failure


@dataclass(frozen=True, kw_only=True)
class ScalingPlan:
    """What is asked for."""

    ranks: tuple[int, ...]  # ascending
    modes: tuple[str, ...]
    rounds: int
    data: str  # "job", or a name of made texts
    warm_up: int = 10  # steps
    steps: int = 50


def bench_scaling(
    jobs: Jobs, plan: ScalingPlan, folder: Path, allocation: Allocation | None, fabric: str | None
) -> dict[str, Any]:
    """Measure what the folder lacks, and return all that it then has: rows by mode, and what failed.

    allocation: what a job of Slurm has; None: this machine. fabric: a calibrated one by file or name.
    Raises InputError for what cannot be measured or compared, MachineFailed where no trial was measured.
    """
    queries, peaks = jobs.train.batch.queries, _fabric(fabric)
    trials = planned(plan.ranks, queries, plan.modes, plan.rounds)
    kept = TrialFolder(folder)
    missing = [trial for trial in trials if trial not in kept.results]
    threads = _threads(jobs, plan, allocation) if missing else 0
    conditions = conditions_here(jobs, plan.data, plan.warm_up, plan.steps)
    kept.begin(jobs, _of_this_start(conditions, threads, allocation) if missing else _of_any_start(conditions))
    arguments = {"data": plan.data, "warm_up": plan.warm_up, "steps": plan.steps, "threads": threads, "pin": True}
    arguments |= {"job": str(kept.job_file.absolute()), "overrides": []}
    here = _here(missing, arguments) if allocation is None else by_slurm(missing, arguments, WORKER, jobs, allocation, folder)
    failed = _measure(here, kept, conditions, missing)
    results = {trial: result for trial, result in kept.results.items() if trial in trials}
    if not results:
        raise MachineFailed(failed[0]["why"])
    sizes = {mode: [(each, queries_of(mode, each, plan.ranks[0], queries)) for each in plan.ranks] for mode in plan.modes}
    rows = summary(results, sizes, peaks)
    about = dataclasses.asdict(kept.conditions) | {"rounds": plan.rounds, "fabric": None if peaks is None else peaks.name}
    return {"out": str(folder), **about, **_of_job(results), "sizes": rows, "failed": failed}


def _fabric(name_or_path: str | None) -> Any:
    if name_or_path is None:
        return None
    from launch.fabric import find_fabric

    return find_fabric(name_or_path)


def _threads(jobs: Jobs, plan: ScalingPlan, allocation: Allocation | None) -> int:
    """Return the threads of a rank; raises InputError where the largest size does not fit, or no start can be made."""
    if allocation is not None:
        for ranks in plan.ranks:
            nodes_of(ranks, allocation.ranks_per_node(jobs))
        refuse_missing_nodes(plan.ranks, jobs, allocation)
        return allocation.cpus_per_rank
    cores, gpus = cores_and_gpus(os.environ)
    found = counted(len(gpus), "GPU") if gpus else counted(cores, "core")
    refuse_too_many(plan.ranks, len(gpus) or cores, f"this machine has {found}")
    return max(1, cores // plan.ranks[-1])


def _of_this_start(conditions: Conditions, threads: int, allocation: Allocation | None) -> Conditions:
    """Return the conditions with what is known of the hardware before the first trial."""
    import torch

    from launch.bench.machine import describe

    # A GPU would have to be opened to tell its name, and this process would hold memory of it.
    is_cpu = allocation is None and not torch.cuda.device_count()
    device = str(describe(torch.device("cpu"))["device"]) if is_cpu else None
    return dataclasses.replace(conditions, threads=threads, device=device)


def _of_any_start(conditions: Conditions) -> Conditions:
    """Return the conditions without what only a new trial has to do with: tables are made again anywhere."""
    return dataclasses.replace(conditions, commit=None, is_modified=None, torch=None)


def _here(trials: Sequence[Trial], arguments: dict[str, Any]) -> Outcomes:
    """Yield trials as they are measured on this machine; the later rounds of a size that failed are left out."""
    failed: set[tuple[int, int]] = set()
    for trial in trials:
        if (trial.ranks, trial.queries) in failed:
            continue
        try:
            yield trial, on_ranks(WORKER, trial.ranks, queries=trial.queries, **arguments)
        except RuntimeError as error:  # of one size: too little memory, perhaps
            failed.add((trial.ranks, trial.queries))
            yield trial, str(error)


def _measure(outcomes: Outcomes, kept: TrialFolder, conditions: Conditions, missing: Sequence[Trial]) -> list[dict[str, Any]]:
    """Keep what comes, and return what failed."""
    failed, num_kept = [], 0
    with contextlib.closing(outcomes), _told_where_it_stopped(kept, missing):
        for trial, outcome in outcomes:
            if isinstance(outcome, str):
                messages().print(f"{trial} failed: {outcome}", markup=False)
                failed.append(dataclasses.asdict(trial) | {"why": outcome})
                continue
            kept.keep(trial, conditions, outcome)
            num_kept += 1
            step_s = statistics.median(outcome["step_s"])
            messages().print(f"[dim]{num_kept} of {len(missing)}: {trial}: {step_s:.4g} s a step[/dim]")
    return failed


@contextlib.contextmanager
def _told_where_it_stopped(kept: TrialFolder, missing: Sequence[Trial]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not isinstance(error, GeneratorExit | InputError):
            left = sum(trial not in kept.results for trial in missing)
            said = f"{counted(len(kept.results), 'trial')} kept in {kept.folder}, {left} to measure"
            messages().print(f"{said}; the same command goes on from there", markup=False)
        raise


def _of_job(results: dict[Trial, dict[str, Any]]) -> dict[str, Any]:
    """Return what the largest size says of the job: one rank alone has no backend."""
    largest = results[max(results)]
    return {name: largest[name] for name in ("backend", "precision", "travels", "passages_per_query", "negatives")}
