"""Who may write to a run: one incarnation of each side at a time, and they are numbered.

A side that starts takes a lock and the next number. The lock refuses a second job. On a cluster it is not enough: when a node
is lost, the job starts again elsewhere while its old processes may still live there, lock in hand. So a job that Slurm has
started again takes the place of its earlier start, and whoever was replaced learns it from the number before it publishes.
"""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from trainer.errors import RunInUse
from trainer.handoff.clock import seconds_since_written
from trainer.handoff.manifest import disk_error, write_atomically

SIDES = {"launch": "negpool run"}  # what a side is called, where that is not its name
LOOK_S = 0.5  # that a start waits for the lock: whoever only looks takes it for a moment


@dataclass
class Claim:
    """One start of one side of a run."""

    run: Path
    side: str  # trainer, miner, or launch: who starts both on one machine
    number: int  # of this start: 1, 2, …
    _lock: filelock.BaseFileLock | None = None  # held where the claim was taken, None on the other ranks

    def check(self) -> None:
        """Raise RunInUse if a later start has taken this one's place; called before anything is published."""
        newest = _read(_path(self.run, self.side))
        if newest.get("number", 0) > self.number:
            raise RunInUse(
                f"{self.run} went over from start {self.number} of its {self.side} to start {newest['number']}, "
                f"on {newest['host']}; this one leaves, and writes nothing more"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return what the other ranks of this start are told; the lock stays where it was taken."""
        return {**self.__dict__, "_lock": None}

    def release(self) -> None:
        """Let go of the lock, where it is held."""
        if self._lock is not None:
            with contextlib.suppress(OSError):  # a file server that has forgotten the lock has let go of it
                self._lock.release()


def claim_side(run: Path, side: str) -> Claim:
    """Take a side's place in a run folder. One rank of a side calls it.

    Raises RunInUse if a live process of another job holds it, and what `disk_error` makes of a folder that cannot be written.
    """
    path, lock_file = _path(run, side), run / "status" / f"{side}.lock"
    me = {"host": socket.gethostname(), "pid": os.getpid(), **_slurm_start()}
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(lock_file)
        try:
            lock.acquire(timeout=LOOK_S)
            held = _read(path)
        except filelock.Timeout:
            held = _read(path)
            if not _is_started_again(held, me):
                raise _in_use(run, side) from None
    except OSError as error:
        raise disk_error(error, lock_file) from error
    number = held.get("number", 0) + 1
    write_atomically(path, json.dumps({"number": number, **me}))
    if not lock.is_locked:
        lock_file.unlink(missing_ok=True)  # the lock of the start before is on the file, not on its name
        lock.acquire(timeout=0)
    return Claim(run, side, number, lock)


def is_claimed(run: Path, side: str) -> bool:
    """Tell whether a live process holds a side's place."""
    lock_file = run / "status" / f"{side}.lock"
    try:
        with filelock.FileLock(lock_file).acquire(timeout=0) if lock_file.exists() else contextlib.nullcontext():
            return False
    except filelock.Timeout:
        return True
    except OSError:  # a folder of another person's, where a lock cannot be taken
        return False


def refuse_live(run: Path, *sides: str, patience_s: float = 0.0) -> None:
    """Raise RunInUse, with the holder's machine, process and age, if a live process holds the place of one of the sides.

    patience_s: for processes to go that were killed a moment ago.
    """
    deadline = time.monotonic() + patience_s
    for side in sides:
        while is_claimed(run, side):
            if time.monotonic() >= deadline:
                raise _in_use(run, side)
            time.sleep(LOOK_S / 10)


def _path(run: Path, side: str) -> Path:
    return run / "status" / f"{side}.claim.json"


def _slurm_start() -> dict[str, Any]:
    """Return which job of Slurm's this is and how often it was started again; nothing outside Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return {} if job is None else {"slurm_job": job, "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}


def _is_started_again(held: dict[str, Any], me: dict[str, Any]) -> bool:
    same_job = held.get("slurm_job") is not None and held["slurm_job"] == me.get("slurm_job")
    return same_job and me["slurm_restarts"] > held["slurm_restarts"]


def _in_use(run: Path, side: str) -> RunInUse:
    held, age_s = _read(_path(run, side)), seconds_since_written(_path(run, side))
    known = [f"Slurm job {held['slurm_job']}"] if "slurm_job" in held else []
    known += [f"process {held['pid']} on {held['host']}"] if {"pid", "host"} <= held.keys() else []
    known += [] if age_s is None else [f"for {_in_words(age_s)}"]
    about = f" ({', '.join(known)})" if known else ""
    return RunInUse(f"another {SIDES.get(side, side)}{about} is at work in {run}; wait for it, stop it, or set run.folder")


def _in_words(seconds: float) -> str:
    unit, length = next((pair for pair in (("hour", 3600), ("minute", 60)) if seconds >= pair[1]), ("second", 1))
    count = max(0, round(seconds / length))
    return f"{count} {unit}" + "s" * (count != 1)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
