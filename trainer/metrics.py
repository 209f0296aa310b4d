"""What a run tells the outside: JSON lines, trackers such as TensorBoard, and a status file that is replaced by rename.

Ranks that do not record get the null objects, so that no loop asks whether recording is on.
"""

import contextlib
import errno
import importlib.util
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from trainer.errors import InputError
from trainer.handoff.clock import seconds_since_written
from trainer.handoff.manifest import disk_error, write_atomically

log = logging.getLogger(__name__)

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}  # by the package that each one needs
PROJECT = "negpool"  # what W&B calls a project and MLflow an experiment


class Metrics(Protocol):
    """A sink of records; `step` is the trainer's step."""

    def record(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """One JSON object a line, units in the keys, each appended by one write. Raises InputError when the disk refuses."""

    def __init__(self, path: Path):
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 - lives as long as the run
            size = os.fstat(self._file.fileno()).st_size
            if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
                self._file.write(b"\n")  # a full disk took half a line: it must not spoil the next
        except OSError as error:
            raise disk_error(error, path) from error

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; numbers, strings and lists of them."""
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise disk_error(error, self._path) from error

    def close(self) -> None:
        self._file.close()


class TrainerMetrics:
    """JSON lines in `logs/metrics.jsonl`, and every number among them in the trackers."""

    def __init__(self, run: Path, trackers: tuple[str, ...] = ("tensorboard",)):
        """trackers: names in TRACKERS, installed. W&B and MLflow take their servers from their own environment variables."""
        self._lines = MetricsFile(run / "logs" / "metrics.jsonl")
        self._trackers = [_start_tracker(name, run) for name in trackers]

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Record one step or event. A tracker that fails is dropped with a warning; the run and its JSON lines go on."""
        self._lines.record(step, values)
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        for tracker in list(self._trackers) if numbers else []:
            try:
                tracker.log(numbers, step=step)
            except Exception as error:  # whatever a client raises when its server is gone
                self._trackers.remove(tracker)
                log.warning("%s is dropped, the run goes on without it: %s", tracker.name, error)

    def close(self) -> None:
        self._lines.close()
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise InputError if a tracker is not installed; the miner, who needs none, does not ask."""
    for name in names:
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise InputError(f"run.trackers names {name!r}, which is not installed; run: pip install {TRACKERS[name]}")


def _start_tracker(name: str, run: Path) -> Any:
    """Return a tracker of accelerate's that has begun; raises InputError for one that cannot."""
    from accelerate import PartialState, tracking  # two seconds, which the miner should not pay

    PartialState()  # the trackers' own messages ask for it; in a trainer it is there already
    logs = run / "logs"
    if name == "wandb":
        tracker = tracking.WandBTracker(PROJECT, name=run.name, dir=str(logs))
    elif name == "mlflow":
        tracker = _MLflow(tracking.MLflowTracker(PROJECT, run_name=run.name))
    else:
        tracker = tracking.TensorBoardTracker("tensorboard", logs)  # the folder's name below logs/
    try:
        tracker.start()
    except Exception as error:  # of the client's own making: not logged in, no such server, …
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(f"run.trackers names {name!r}, which does not start ({reason}); set it up, or leave it out") from error
    return tracker


class _MLflow:
    """MLflow's tracker, with names that it takes: `eval/ndcg@10` is `eval/ndcg_10` there."""

    name = "mlflow"

    def __init__(self, tracker: Any):
        self.start, self.finish, self._log = tracker.start, tracker.finish, tracker.log

    def log(self, values: dict[str, float], step: int) -> None:
        self._log({re.sub(r"[^\w\-. :/]", "_", key): value for key, value in values.items()}, step=step)


class NoMetrics:
    """Records nothing: for the ranks that do not speak."""

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Status:
    """`status/SIDE.json`: phase, progress and heartbeat of one side of a run, for `status` and the live view."""

    def __init__(self, run: Path, side: str, may_write: Callable[[], None] = lambda: None, min_interval_s: float = 0.5):
        """may_write: called before each write; raises if this process may not write any more."""
        self._path = _status_file(run, side)
        self.values: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname()}
        self._written = 0.0
        self._may_write, self._min_interval_s = may_write, min_interval_s
        self._writing = threading.Lock()

    def update(self, **values: Any) -> None:
        """Merge values in and write the file, at most every `min_interval_s` unless the phase changed. From any thread."""
        with self._writing:
            changed_phase = values.get("phase", self.values.get("phase")) != self.values.get("phase")
            self.values |= values
            if changed_phase or time.monotonic() - self._written >= self._min_interval_s:
                self._written = time.monotonic()
                self._may_write()
                write_atomically(self._path, json.dumps({**self.values, "heartbeat": time.time()}))


class NoStatus:
    """Tells nothing: for the ranks that do not speak."""

    values: Mapping[str, Any] = MappingProxyType({})

    def update(self, **values: Any) -> None:
        """Do nothing."""


def read_status(run: Path, side: str) -> dict[str, Any]:
    """Return what one side last wrote, or an empty dictionary."""
    try:
        return json.loads(_status_file(run, side).read_text())
    except (OSError, ValueError):
        return {}


def write_refusal(run: Path, side: str, sentence: str) -> None:
    """Say in a side's status file that it cannot go on, and why. A disk that is full takes it in place of what was there."""
    path, refusal = _status_file(run, side), {"phase": "refused", "error": sentence}
    try:
        write_atomically(path, json.dumps({**read_status(run, side), **refusal}))
    except InputError:
        # In the room that the file has; cut afterwards, or others would take what that frees.
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            file.write(json.dumps(refusal).encode())
            file.truncate()


def heartbeat_age_s(run: Path, side: str) -> float | None:
    """Return how long one side has not written its status, by the clock of the file server; None if it never did."""
    return seconds_since_written(_status_file(run, side))


def forget_status(run: Path) -> None:
    """Delete what both sides last wrote, so that the words of an earlier start are not taken for those of the next."""
    for side in ("trainer", "miner"):
        _status_file(run, side).unlink(missing_ok=True)


def _status_file(run: Path, side: str) -> Path:
    return run / "status" / f"{side}.json"
