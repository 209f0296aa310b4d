"""One case carried out: real sides of a real run, by the supervisor's own commands, watched until they end.

Both together are `negpool run`. The trainer alone draws from version 0, which was made beforehand. The miner alone is a service
that is handed the checkpoints of a trainer, each as soon as the one before it is mined, so that it never waits. No run evaluates
anything, and none is started again: an evaluation, or a second start, would be timed with it.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.bench.overlap.cases import Case
from launch.bench.overlap.division import Hardware
from launch.bench.overlap.processor_time import ProcessorTime
from launch.jobfile import Jobs, Override, read_job
from launch.local import STOP_GRACE_S, WITHOUT_MINER, Side, sides
from launch.restarts import last_words
from launch.shares import Shares, cores_in_order
from launch.sides import keep_job
from trainer.errors import EXIT_STOPPED, InputError, MachineFailed
from trainer.handoff.manifest import read_latest, versions, write_latest
from trainer.handoff.negatives import negatives_folder, version_name
from trainer.handoff.weights import ENCODER, checkpoints_folder, open_checkpoint
from trainer.metrics import Status, read_status

LOOK_EVERY_S = 0.5
REFRESHES = 3  # of the miner alone
STEPS_ALONE = 20  # of the trainer alone on a part of the machine
NO_SPLIT = "none"  # as eval.split: nothing is evaluated
UNDISTURBED: list[Override] = [
    ("eval.split", NO_SPLIT),
    ("eval.every_steps", None),
    ("stop.patience", None),
    ("stop.max_fall", None),
    ("run.trackers", []),
    ("launch.max_restarts", 0),
]


@dataclass(frozen=True)
class Workplace:
    """What all cases have in common."""

    job: Path
    overrides: Sequence[Override]
    folder: Path
    hardware: Hardware

    def folder_of(self, name: str) -> Path:
        return self.folder / "runs" / name

    @property
    def made(self) -> Path:
        """A run folder with what was made beforehand: version 0, and checkpoints for the miner alone."""
        return self.folder_of("made")

    def jobs(self, run: Path, more: Sequence[Override] = ()) -> Jobs:
        """Return the job of a run folder."""
        return read_job(self.job, [*self.overrides, *UNDISTURBED, ("run.folder", str(run)), *more])


@dataclass(frozen=True)
class Watched:
    """What was seen of a case that went to its end."""

    run: Path
    started_at: float
    processor_time: ProcessorTime | None = None  # where both sides were at work on the same cores


def make_version_0(place: Workplace) -> None:
    """Mine version 0 from BM25, unless it is there; raises InputError where the job makes none."""
    if read_latest(negatives_folder(place.made)) is not None:
        return
    run = _fresh(place.made)
    miner = _miner(place, run, place.hardware.num_units)
    miner.command.append("--once")
    _wait(miner, run, "version 0 from BM25")
    if read_latest(negatives_folder(run)) is None:
        raise InputError(
            f"the miner made no version 0 from BM25 ({miner.log} says why), and the trainer alone draws from that one"
        )


def train_alone(place: Workplace, case: Case, more: Sequence[Override]) -> Watched:
    """Train on a part of the machine, with the negatives of version 0; more: settings of this case."""
    run = _fresh(place.folder_of(case.name))
    jobs = place.jobs(run, more)
    ranks = min(jobs.launch.train_ranks, case.units)
    keep_job(jobs)
    _hand_over(place.made, run, negatives_folder, version_name(0))
    trainer, _ = sides(run, run / "job.toml", _alone(place.hardware, case.units, train_ranks=ranks))
    trainer.cores = _cores(place.hardware, slice(case.units))
    return _watched(trainer, run, case.name)


def mine_alone(place: Workplace, case: Case) -> Watched:
    """Mine the checkpoints that were kept for it, one after the other, on a part of the machine."""
    run = _fresh(place.folder_of(case.name))
    miner = _miner(place, run, case.units)
    _hand_over(place.made, run, negatives_folder, version_name(0))
    waiting = [folder.name for folder in versions(checkpoints_folder(place.made))]
    if not waiting:
        raise InputError(
            f"{place.made} has lost its checkpoints, which the miner alone mines; delete {place.folder} to begin anew"
        )

    def hand_next() -> None:
        """Hand over a checkpoint whenever the last is mined, and in the end say that the trainer is done."""
        if refused := read_status(run, "miner").get("num_refused"):
            raise MachineFailed(f"the miner refused {refused} of the trainer's checkpoints; {miner.log} says why")
        is_mined = read_latest(negatives_folder(run)) == version_name(len(versions(checkpoints_folder(run))))
        if is_mined and waiting:
            _hand_over(place.made, run, checkpoints_folder, waiting.pop(0))
        elif is_mined and not read_status(run, "trainer"):
            said = Status(run, "trainer")
            said.update(phase="finished", training_done=True)
            said.close()

    return _watched(miner, run, case.name, hand_next)


def run_together(place: Workplace, case: Case, more: Sequence[Override]) -> Watched:
    """Run both sides by a division of the machine; more: settings of this case."""
    run = _fresh(place.folder_of(case.name))
    assert case.division is not None
    jobs = place.jobs(run)
    jobs = place.jobs(run, [*more, *case.division.settings(jobs.launch, place.hardware)])
    keep_job(jobs)
    (run / "logs").mkdir()
    command = [sys.executable, "-m", "negpool", "run", str(run / "job.toml")]
    both = Side("trainer", command, {**os.environ, "PYTHONSAFEPATH": "1"}, run / "logs" / "run.log")
    taken = ProcessorTime()

    def look() -> None:
        if both.process is not None:
            taken.look(both.process.pid)

    watched = _watched(both, run, case.name, look, taken)
    if WITHOUT_MINER in both.log.read_text(errors="replace"):
        raise MachineFailed(f"the miner of {case.name} did not go to its end; {both.log} says why")
    return watched


def keep_checkpoints(place: Workplace, run: Path) -> None:
    """Keep a trainer's newest checkpoints for the miner alone, but not its last: no service mines that one."""
    found = [open_checkpoint(folder, ENCODER) for folder in versions(checkpoints_folder(run))]
    shutil.rmtree(checkpoints_folder(place.made), ignore_errors=True)
    names = [checkpoint.folder.name for checkpoint in found if not checkpoint.manifest.get("is_final")]
    for name in names[-REFRESHES:]:
        _hand_over(run, place.made, checkpoints_folder, name)


def drop_what_is_large(run: Path) -> None:
    """Delete what nobody reads any more of a run: logs, status and job stay."""
    for name in ("checkpoints", "negatives", "shards", "evaluations"):
        shutil.rmtree(run / name, ignore_errors=True)


def _miner(place: Workplace, run: Path, units: int) -> Side:
    """Return a service that has the last cores or GPUs of the machine for itself, not started."""
    jobs = place.jobs(run)
    keep_job(jobs)
    ranks = units if place.hardware.gpus else min(jobs.launch.mine_ranks, units)
    _, miner = sides(run, run / "job.toml", _alone(place.hardware, units, mine_ranks=ranks))
    miner.cores = _cores(place.hardware, slice(-units, None))
    return miner


def _alone(hardware: Hardware, units: int, train_ranks: int = 0, mine_ranks: int = 0) -> Shares:
    """Return the shares of a machine of which one side has a part, and the other nothing."""
    if not hardware.gpus:
        return Shares(train_ranks, mine_ranks, threads=max(1, units // (train_ranks + mine_ranks)))
    threads = max(1, hardware.cores // units)
    if train_ranks:
        return Shares(units, 0, threads, train_gpus=hardware.gpus[:units])
    return Shares(1, mine_ranks, threads, mine_gpus=hardware.gpus[-units:])


def _cores(hardware: Hardware, part: slice) -> frozenset[int]:
    return frozenset() if hardware.gpus else frozenset(cores_in_order()[part])


def _fresh(run: Path) -> Path:
    """Return the folder, empty: what an interrupted run has left is not timed."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    return run


def _hand_over(source: Path, run: Path, folder_of: Callable[[Path], Path], name: str) -> None:
    """Publish a version or a checkpoint of another run in a run, by links to its files."""
    shutil.copytree(folder_of(source) / name, folder_of(run) / name, copy_function=os.link)
    write_latest(folder_of(run), name)


def _watched(
    side: Side, run: Path, name: str, on_look: Callable[[], None] = lambda: None, taken: ProcessorTime | None = None
) -> Watched:
    started_at = time.time()
    _wait(side, run, name, on_look)
    return Watched(run, started_at, taken)


def _wait(side: Side, run: Path, what: str, on_look: Callable[[], None] = lambda: None) -> None:
    """Start a side and wait until it has ended; raises InputError or MachineFailed where it did not end well."""
    try:
        side.start(run)
        while (code := side.exit_code()) is None:
            on_look()
            time.sleep(LOOK_EVERY_S)
    except BaseException:
        _stop(side, run)
        raise
    if code:
        _raise_for(code, side, run, what)


def _stop(side: Side, run: Path) -> None:
    """Ask a side to leave, and end it if it does not."""
    if side.process is None:
        return
    side.exit_code()  # learn its processes first
    side.ask_to_stop(run)
    deadline = time.monotonic() + STOP_GRACE_S
    while side.exit_code() is None and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
    side.kill()


def _raise_for(code: int, side: Side, run: Path, what: str) -> Any:
    if code == EXIT_STOPPED:
        raise KeyboardInterrupt
    said: dict[str, Any] = read_status(run, side.name)
    why = said.get("error") or last_words(side.log, 0) or f"it ended with code {code}"
    error = InputError if said.get("phase") == "refused" or code == 2 else MachineFailed
    raise error(f"{what} did not go to its end: {why}; its logs are in {side.log.parent}")
