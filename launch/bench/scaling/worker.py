"""One size of `negpool bench scaling`, on its ranks: steps of a job as `negpool train` takes them, and what they take.

Nothing is evaluated, saved or tracked. No miner runs: negatives are drawn at random once. Each rank keeps its spans of the
measured steps; at the end rank 0 gets those of all.
"""

import contextlib
import os
import shutil
import socket
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from gradcache import StepResult
from gradcache.buckets import note_buckets
from gradcache.spans import Recorder, recording, span
from launch.bench.machine import matmul_rate, peak_bytes, start_peak
from launch.bench.made_texts import MIXES, NUM_PAIRS, data_of
from launch.bench.scaling.cores import pin_to_own_cores
from launch.bench.scaling.counters import bytes_sent
from launch.bench.scaling.random_negatives import publish_random
from launch.bench.scaling.size_report import RankFigures, report
from launch.bench.scaling.step_counts import count_step, work_of_step
from launch.bench.scaling.times import STEP, StepTimes, times_of_step
from launch.bench.shapes import model_of
from launch.jobfile import Jobs, read_job
from launch.ranks import answer
from trainer.early_stop import StopSettings
from trainer.errors import InputError
from trainer.job import EvalSettings, ProfileSettings, TrainJob
from trainer.lost_ranks import naming_lost
from trainer.precision import DTYPES
from trainer.prepare import Training, prepare
from trainer.train import switch_negatives, take_step
from trainer.world import World, join_world


def measure_size(
    job: str, overrides: list[str], data: str, queries: int, warm_up: int, steps: int, threads: int, pin: bool
) -> dict[str, Any] | None:
    """Return what a size's steps took on rank 0, None elsewhere. Collective.

    job: path of a job file. data: "job", or a name of MIXES. queries: of a step, over all ranks. threads: of a rank on a CPU,
    which with `pin` has cores of its own.
    """
    jobs = read_job(Path(job), overrides)
    cores = pin_to_own_cores(os.environ, threads) if pin else None
    precision = jobs.train.precision
    world = join_world(precision.encode, precision.tf32, jobs.train.model.compile, jobs.train.parallel.timeout_s)
    try:
        with naming_lost(world):
            set_threads(world, threads)
            found = measure(world, jobs, data, queries, warm_up, steps)
            return None if found is None else found | {"threads": threads, "pinned": cores is not None}
    finally:
        world.leave()


def set_threads(world: World, threads: int) -> None:
    """Have torch compute with so many threads, where it computes on a CPU."""
    if world.device.type == "cpu":
        torch.set_num_threads(threads)


def measure(world: World, jobs: Jobs, data: str, queries: int, warm_up: int, steps: int) -> dict[str, Any] | None:
    """Return what the steps took on rank 0, None elsewhere. Collective."""
    if queries % world.num_ranks:
        raise InputError(
            f"{queries} queries cannot be divided among {world.num_ranks} ranks; set --queries to a multiple of them"
        )
    with _run_folder(world, jobs.train.run.folder) as folder:
        job = measured_job(jobs.train, folder, data, queries, warm_up + steps + 1)
        run = prepare(job, world)
        try:
            is_drawn = job.negatives.per_query != 0 and run.feed.in_force is None and run.data.given is None
            if is_drawn:
                publish_random(run, jobs.mine.sample.num_negatives)
            own = _measure_run(run, warm_up, steps)
        finally:
            _close(run)
        every = world.gather_objects(own)
        return report(run, every, is_drawn) if world.speaks else None


def measured_job(job: TrainJob, folder: Path, data: str, queries: int, steps: int) -> TrainJob:
    """Return the job with what is measured of it: its steps, on its own texts or on made ones."""
    if data != "job":
        if data not in MIXES:
            raise InputError(f'data="{data}" are no made texts; expected "job", or one of {", ".join(MIXES)}')
        path = data_of(data, job.data.cache, max(NUM_PAIRS, queries))
        job = replace(job, data=replace(job.data, path=path, columns={}, train_split="train"), sources={})
    return replace(
        job,
        run=replace(job.run, folder=folder, trackers=()),
        model=replace(job.model, name=model_of(job.model.name, job.data.cache)),
        batch=replace(job.batch, queries=queries),
        optim=replace(job.optim, steps=steps),
        negatives=replace(job.negatives, schedule=()),
        eval=EvalSettings(),
        stop=StopSettings(),
        profile=ProfileSettings(),
    )


def one_step(run: Training) -> StepResult:
    """Take a step as the training loop does, with the agreement on negatives before it. Collective."""
    with span(STEP):
        if switch_negatives(run):
            raise RuntimeError("asked to stop")
        return take_step(run)[0]


def _measure_run(run: Training, warm_up: int, steps: int) -> RankFigures:
    """Return this rank's part of what is measured. Collective."""
    world, module = run.world, run.state.parallel.module
    start_peak(world.device)
    with recording(world.device) as recorder:
        if isinstance(module, DistributedDataParallel):
            note_buckets(module, recorder)
        for _ in range(warm_up):
            one_step(run)
        recorder.read()
        world.barrier()
        before = _sent_of_host(world)
        times, works = _steps(run, recorder, steps)
        world.barrier()
        sent = before, _sent_of_host(world)
    peak = peak_bytes(world.device) / 2**30
    counted = count_step(run, one_step)
    world.barrier()  # every rank multiplies at once
    rate = matmul_rate(world.device, DTYPES[run.job.precision.encode])
    return RankFigures(
        rank=world.rank,
        host=os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        ranks_per_node=world.ranks_per_node,
        steps=times,
        tokens=statistics.median(result.num_tokens for result in works),
        encoder_flops=statistics.median(work_of_step(run, result) for result in works),
        matmul_flops_per_s=rate,
        peak_gib=peak,
        sent=sent,
        counted_bytes=counted.sent_bytes,
        formula_bytes=counted.formula_bytes,
        counted_result=counted.result,
    )


def _steps(run: Training, recorder: Recorder, steps: int) -> tuple[list[StepTimes], list[StepResult]]:
    """Take the measured steps. Collective."""
    times, results = [], []
    for _ in range(steps):
        results.append(one_step(run))
        times.append(times_of_step(recorder.read()))
    return times, results


def _sent_of_host(world: World) -> dict[str, int]:
    return bytes_sent(world.device.type == "cuda")


@contextlib.contextmanager
def _run_folder(world: World, asked: Path) -> Iterator[Path]:
    """Give a run folder for a while, which all ranks see: beside the job's own where there are several machines. Collective."""

    def make() -> str:
        several = world.num_ranks > world.ranks_per_node
        if several:
            asked.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=".scaling-", dir=asked.parent if several else None)

    folder = Path(world.decide(make))
    try:
        yield folder
        world.barrier()
    finally:
        if world.speaks:
            shutil.rmtree(folder, ignore_errors=True)


def _close(run: Training) -> None:
    """Let go of what a run holds."""
    run.batches.close()  # before the negatives that it may be reading
    run.feed.close()
    run.metrics.close()
    run.status.close()
    run.claim.release()


if __name__ == "__main__":
    answer(measure_size)
