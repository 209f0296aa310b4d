"""`negpool bench overlap`: trainer and miner together against each alone, by how the machine is divided between them.

Measured are real runs of one job. What it answers: how much slower a side is beside the other, how old the negatives are that the
trainer draws from, and by which division a measure on dev is reached first.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from launch.bench.machine import describe
from launch.bench.overlap.at_work import (
    STEPS_ALONE,
    Watched,
    Workplace,
    drop_what_is_large,
    keep_checkpoints,
    make_version_0,
    mine_alone,
    run_together,
    train_alone,
)
from launch.bench.overlap.cases import Case, planned
from launch.bench.overlap.course import describe_ages, describe_steps, refresh_seconds, step_times
from launch.bench.overlap.dev_scores import MEASURE, scores_of
from launch.bench.overlap.division import Hardware, read_shares
from launch.bench.overlap.kept_cases import KeptCases, conditions_of
from launch.bench.overlap.slow_downs import summarise
from launch.jobfile import Jobs, Override, read_job
from launch.output import messages
from launch.report.history import read_history
from launch.shares import cores_and_gpus
from trainer.data.datasets import RetrievalData, open_data
from trainer.errors import InputError

EVALUATED = 8  # checkpoints of a run, about


def bench_overlap(
    job: Path, overrides: Sequence[Override], shares: str | None, target: float | None, rounds: int, folder: Path
) -> dict[str, Any]:
    """Return what was measured; raises InputError for what cannot be.

    folder: where each run and what was measured is kept, and gone on with. target: of MRR@10; None: one that all shares reach.
    """
    if target is not None and not 0 < target <= 1:
        raise InputError(f"--target {target:g} is no MRR@10; expected a number above 0, and 1 at most")
    jobs = read_job(job, overrides)
    _refuse_job(jobs)
    hardware = Hardware(*cores_and_gpus(os.environ))
    divisions = read_shares(shares, hardware, jobs.launch)
    data = open_data(jobs.train.data, jobs.train.sources)
    split, note = evaluated_split(jobs, set(data.qrels), target)
    device = describe(torch.device("cuda:0" if hardware.gpus else "cpu"))
    place = Workplace(job.absolute(), overrides, folder.absolute(), hardware)
    kept = KeptCases(place.folder, conditions_of(jobs, data.digest, hardware, device))
    steps, cases = _number_of_steps(jobs, data), planned(divisions, hardware, rounds)
    for number, case in enumerate(cases, start=1):
        told = f"{number} of {len(cases)}, round {case.round}: {case.on(hardware)}"
        if case.name in kept.results:
            messages().print(f"[dim]{told}: measured before[/dim]")
            continue
        messages().print(f"[dim]{told}[/dim]")
        kept.keep(case.name, _measure(place, case, jobs, steps, split))
    found = summarise(cases, kept.results, hardware, target)
    queries = 0 if split is None else len(data.evaluated_queries(split))
    about = {"job": str(job), "unit": hardware.unit, "units": hardware.num_units, "rounds": rounds, "steps": steps}
    return {**device, **about, "split": split, "queries": queries, "notes": [note] if note else [], **found}


def _refuse_job(jobs: Jobs) -> None:
    """Raise InputError for a job in which the two sides do not meet, or not in their own time."""
    if jobs.train.negatives.per_query == 0:
        raise InputError("negatives.per_query=0 draws nothing that a miner has found, so nothing overlaps; set it to 1 or more")
    if jobs.train.negatives.schedule:
        raise InputError(
            "negatives.schedule fixes when versions come into force, whatever the miner's share; leave it out of this job"
        )
    if jobs.mine.mine.bm25_top_k == 0:
        raise InputError("mine.bm25_top_k=0 makes no version 0, and the trainer alone draws from that one; set it to 1 or more")


def evaluated_split(jobs: Jobs, splits: set[str], target: float | None) -> tuple[str | None, str | None]:
    """Return the split on which checkpoints are measured, and a sentence where it is not that of dev; None: there is none.

    Raises InputError where a target cannot be measured on any.
    """
    dev, test = jobs.train.eval.dev_split, jobs.train.eval.split
    if dev in splits:
        return dev, None
    if test in splits:
        return test, f"The data have no split {dev} (eval.dev_split); MRR@10 is measured on {test} instead (eval.split)."
    if target is not None:
        raise InputError(
            f"--target {target:g} cannot be measured: the data have neither eval.dev_split={dev!r} nor eval.split={test!r}; "
            f"set one of them to a split that is there ({', '.join(sorted(splits))}), or leave out --target"
        )
    return None, f"The data have neither a split {dev} nor {test}: no MRR@10 is measured."


def _number_of_steps(jobs: Jobs, data: RetrievalData) -> int:
    train = jobs.train
    return train.optim.steps or math.ceil(
        train.optim.epochs * len(data.training_queries(train.data.train_split)) / train.batch.queries
    )


def kept_steps(every: int, steps: int) -> int:
    """Return the multiples of which step are kept, so that about EVALUATED checkpoints are. every: steps between two of them."""
    return every * max(1, round(steps / every / EVALUATED))


def _measure(place: Workplace, case: Case, jobs: Jobs, steps: int, split: str | None) -> dict[str, Any]:
    """Return what one case came to."""
    every = kept_steps(jobs.train.checkpoint.every_steps, steps)
    kept: list[Override] = [("checkpoint.keep_every_steps", every)]
    make_version_0(place)
    if case.sides == "miner":
        watched = mine_alone(place, case)
        result: dict[str, Any] = {"refreshes_s": refresh_seconds(read_history(watched.run))}
    elif case.sides == "trainer":
        is_whole = case.units == place.hardware.num_units
        watched = train_alone(place, case, kept if is_whole else [("optim.steps", min(steps, STEPS_ALONE))])
        result = _of_trainer(watched, split if is_whole else None, every)
        if is_whole and case.round == 1:
            keep_checkpoints(place, watched.run)
    else:
        watched = run_together(place, case, kept)
        result = _of_trainer(watched, split, every) | _of_both(place, watched)
    drop_what_is_large(watched.run)
    return result


def _of_trainer(watched: Watched, split: str | None, every: int) -> dict[str, Any]:
    """Return the times of steps, and what checkpoints measure by the minutes since the start; every: so many steps."""
    history = read_history(watched.run)
    result = {**describe_steps(history), "started_at": watched.started_at}
    if split is not None:
        scores = dict(sorted(scores_of(watched.run, split, every).items()))
        minutes = step_times(history, list(scores), watched.started_at)
        result["course"] = [
            {"step": step, "minutes": at, MEASURE: score} for (step, score), at in zip(scores.items(), minutes, strict=True)
        ]
    return result


def _of_both(place: Workplace, watched: Watched) -> dict[str, Any]:
    """Return refreshes, ages, and what of the machine's time each side took between the first and the last step."""
    history = read_history(watched.run)
    steps = describe_steps(history)
    result = {"refreshes_s": refresh_seconds(history), **describe_ages(history)}
    if not place.hardware.gpus and watched.processor_time is not None:
        begin, end = steps["begun_at"], steps["ended_at"]
        of_machine = place.hardware.cores * (end - begin)
        taken = watched.processor_time.taken(begin, end)
        result["share_of_cores"] = {side: round(seconds / of_machine, 4) for side, seconds in taken.items()}
    return result
