"""The main job: check everything, run both sides, compare BM25, the untrained and the trained model, say what comes next."""

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from launch.counted import counted
from launch.foreseen_warnings import warnings_of_job
from launch.jobfile import Jobs
from launch.local import supervise
from launch.next_steps import next_steps
from launch.output import FEW_QUERIES, ROW_TITLES, VERDICT_STYLES, measures_table
from launch.phases import clock
from launch.shares import Shares, cores_and_gpus, share_out
from launch.sides import keep_job
from launch.view import View
from trainer.data.datasets import RetrievalData, open_data
from trainer.fits import check_sizes
from trainer.handoff.claim import claim_side
from trainer.handoff.manifest import read_latest, write_atomically
from trainer.handoff.settings import places_of
from trainer.handoff.weights import best_checkpoint, checkpoints_folder
from trainer.metrics import read_status


def run_main_job(jobs: Jobs, command: str, console: Console, allow_change: bool = False) -> dict[str, Any]:
    """Do what `run_job` does, and tell the person what came of it and what comes next.

    command: what goes on with the run.
    """
    outcome = run_job(jobs, console, allow_change)
    if outcome["finished"]:
        tell_results(console, jobs, open_data(jobs.train.data, jobs.train.sources), outcome)
    else:
        saved = f"step {outcome['step']} is saved" if outcome["step"] else "nothing was trained and saved yet"
        console.print(f"Stopped; {saved}. To go on: [bold]{escape(command)}[/bold]")
    return outcome


def run_job(jobs: Jobs, console: Console, allow_change: bool = False, mines: bool = True) -> dict[str, Any]:
    """Run a job to its end, or until asked to stop; return what `results.json` holds, and whether it finished.

    mines: without, the trainer is alone. Raises RunInUse where another process is at work in the run folder.
    """
    claim = claim_side(jobs.train.run.folder, "launch")
    try:
        return _run_claimed(jobs, console, allow_change, mines)
    finally:
        claim.release()


def _run_claimed(jobs: Jobs, console: Console, allow_change: bool, mines: bool) -> dict[str, Any]:
    started = time.monotonic()
    run = jobs.train.run.folder
    data = open_data(jobs.train.data, jobs.train.sources)  # a bad input ends here, before anything starts
    plan = share_out(jobs.launch, *cores_and_gpus(os.environ), mines)
    check_sizes(jobs.train, data, plan.train_ranks)
    keep_job(jobs, allow_change)
    console.print(_announcement(jobs, data, plan))
    for sentence in warnings_of_job(jobs, data, mines):
        console.print(f"warning: {sentence}", style="yellow", markup=False)
    with View(console, ("trainer", "miner") if mines else ("trainer",)) as view:
        how = supervise(run, run / "job.toml", jobs.launch, plan, view)
    seconds = _add_seconds(run, time.monotonic() - started)
    if how == "stopped":
        return {"finished": False, "step": _saved_step(run), "run": str(run)}
    return {"finished": True, "run": str(run), **collect_results(jobs, data, seconds)}


def collect_results(jobs: Jobs, data: RetrievalData, seconds: float) -> dict[str, Any]:
    """Return what became of a finished run, BM25 included, and keep it in `results.json`; seconds: over all its starts."""
    from launch.models import bm25_of_each  # these bring transformers: seconds, for which no side should wait before it starts
    from trainer.results import write_results

    job = jobs.train
    bm25_QM = bm25_of_each(data, job.eval.split) if job.eval.split in data.qrels else None
    return write_results(job.run.folder, job.eval.split, job.stop.measure, bm25_QM, seconds=round(seconds, 1))


def _saved_step(run: Path) -> int:
    """Return the step that a stopped run goes on from: that of the newest checkpoint, 0 where there is none."""
    newest = read_latest(checkpoints_folder(run))
    return 0 if newest is None else int(newest.removeprefix("step-"))


def _add_seconds(run: Path, seconds: float) -> float:
    """Return the seconds of this start and of all earlier ones that ended in order."""
    earlier = float(read_status(run, "launch").get("seconds", 0.0))
    write_atomically(run / "status" / "launch.json", json.dumps({"seconds": earlier + seconds}))
    return earlier + seconds


def _announcement(jobs: Jobs, data, plan: Shares) -> str:
    train = jobs.train
    num_queries = len(data.training_queries(train.data.train_split))
    sizes = f"{counted(num_queries, 'training query')}, {counted(len(data.corpus), 'passage')}"
    return f"[bold]{train.run.folder}[/bold]: {sizes} from {data.path}.\n{plan}.\nLogs of both sides: {train.run.folder / 'logs'}"


def tell_results(console: Console, jobs: Jobs, data: RetrievalData, results: dict[str, Any]) -> None:
    """Print the table, the verdict, and what can be done with the model."""
    run = jobs.train.run.folder
    rows = {name: results[name] for name in ROW_TITLES if name in results}
    if rows:
        title = counted(results["num_test_queries"], f"{jobs.train.eval.split} query")
        intervals = results["intervals"] if results["num_test_queries"] < FEW_QUERIES else None
        steps = results["steps"] if "last" in rows else None
        console.print(measures_table(rows, title, intervals, steps))
        if intervals:
            console.print("[dim]below each figure: its 95 % interval over queries[/dim]")
    tell_verdict(console, results["verdict"])
    checkpoint = best_checkpoint(run)
    assert checkpoint is not None  # a finished run has saved its last step
    console.print(
        f"{counted(results['versions_swapped'], 'version')} of mined negatives swapped in, {clock(results['seconds'])} in all."
    )
    _, columns = places_of(jobs.train.data, jobs.train.sources)[0]
    for what, how in next_steps(run, checkpoint.encoder_folder, data, jobs.train.eval.split, columns):
        console.print(f"{what + ':' if what else '':<15}[bold]{escape(how)}[/bold]")


def tell_verdict(console: Console, verdict: dict[str, Any]) -> None:
    """Print the verdict on a run, and what both sides still warned of at its end."""
    console.print(verdict["sentence"], style=VERDICT_STYLES[verdict["level"]], markup=False)
    for warning in verdict["warnings"]:
        if warning["sentence"] not in verdict["sentence"]:
            console.print(f"warning: {warning['sentence']}", style="yellow", markup=False)
