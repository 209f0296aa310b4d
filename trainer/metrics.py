"""What a run tells the outside: JSON lines, trackers such as TensorBoard, and a status file that is replaced by rename.

A disk that fails here ends no run: it is warned of once, and again when it is over; lines are kept until they can be
written. A training step waits for none of it: lines, trackers and the status are written by threads, and what is read right
behind `record` may lack the last moment; `close` and a new phase wait for all. Ranks that do not record get the null objects, so
that no loop asks whether recording is on.
"""

import collections
import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from trainer.errors import MUST_NOT_GO_ON, REFUSED, InputError, MachineFailed, RunInUse, phase_of
from trainer.handoff.clock import seconds_since_written
from trainer.handoff.manifest import disk_error, is_disk_full, write_atomically
from trainer.trackers import Trackers
from trainer.writer import Writer

log = logging.getLogger(__name__)

MOST_KEPT_LINES = 10_000  # while the disk refuses them: some ten megabytes
KEPT_ON_A_FULL_DISK = ("pid", "host", "phase", "error", "step", "num_steps")  # of a status


class Metrics(Protocol):
    """A sink of records; `step` is the trainer's step."""

    def record(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """One JSON object a line, units in the keys, each appended by one write."""

    def __init__(self, path: Path):
        """Raise InputError for a place where nothing can be written."""
        self._path, self._handle = path, -1
        self._kept: collections.deque[bytes] = collections.deque(maxlen=MOST_KEPT_LINES)  # not written yet
        self._failure: InputError | MachineFailed | None = None
        self._write_kept()
        if isinstance(self._failure, InputError):
            raise self._failure

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; numbers, strings and lists of them."""
        self.append(line_of(step, values))

    def append(self, line: bytes) -> None:
        """Append one line; what the disk refuses is written with a later one."""
        self._kept.append(line)
        self._write_kept()

    def close(self) -> None:
        self._write_kept()
        self._close()

    def _write_kept(self) -> None:
        try:
            if self._handle < 0:
                self._open()
            while self._kept:
                if os.write(self._handle, self._kept[0]) < len(self._kept[0]):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._kept.popleft()
        except OSError as error:
            self._close()  # a stale handle stays stale
            failure = disk_error(error, self._path)
            if self._failure is None:
                log.warning("metrics wait until they can be written: %s", failure)
            self._failure = failure
        else:
            if self._failure is not None:
                log.info("%s is written again", self._path)
            self._failure = None

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._handle).st_size
        if size and os.pread(self._handle, 1, size - 1) != b"\n":
            os.write(self._handle, b"\n")  # a full disk took half a line: it must not spoil the next

    def _close(self) -> None:
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                os.close(self._handle)
        self._handle = -1


def line_of(step: int, values: dict[str, Any]) -> bytes:
    """Return a record as a line of JSON, with the time of now."""
    return json.dumps({"step": step, "time": round(time.time(), 3), **values}).encode() + b"\n"


class TrainerMetrics:
    """JSON lines in `logs/metrics.jsonl`, and every number among them in the trackers.

    Each has a thread of its own: a server that is gone may hold a tracker for minutes, and no line waits for it.
    """

    def __init__(self, run: Path, trackers: tuple[str, ...] = ("tensorboard",)):
        """trackers: see `Trackers`. They start in their thread, which takes seconds of imports."""
        self._lines = MetricsFile(run / "logs" / "metrics.jsonl")
        self._line_writer, self._tracker_writer = Writer(), Writer()
        self._trackers = Trackers(trackers, run)
        self._tracker_writer.put(self._trackers.start)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Record one step or event, behind the caller's back."""
        self._line_writer.put(self._lines.append, line_of(step, values))
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        if numbers:
            self._tracker_writer.put(self._trackers.record, step, numbers)

    def close(self) -> None:
        """Return when all is written."""
        self._line_writer.put(self._lines.close)
        self._tracker_writer.put(self._trackers.close)
        self._line_writer.close()
        self._tracker_writer.close()


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
        self._writer, self._put_at = Writer(), 0.0
        self._may_write, self._min_interval_s = may_write, min_interval_s
        self._changing = threading.Lock()
        self._phase_began = time.monotonic()
        self.seconds: dict[str, float] = {}  # of the phases that are over, by name
        self._is_put = False
        self._is_failing = False

    def update(self, **values: Any) -> None:
        """Merge values in, and have the file written, at most every `min_interval_s`. From any thread.

        Returns at once, and raises what `may_write` said to an earlier call; where the phase changed, when it is written.
        """
        self._writer.check()
        with self._changing:
            changed_phase = values.get("phase", self.values.get("phase")) != self.values.get("phase")
            if changed_phase:
                self._end_phase()
            self.values |= values
            if changed_phase or time.monotonic() - self._put_at >= self._min_interval_s:
                self._put()
        if changed_phase:
            self._writer.wait()

    def flush(self) -> None:
        """Write the last values, which `update` may have kept for later, and return when they are written."""
        with contextlib.suppress(RunInUse):
            with self._changing:
                self._put()
            self._writer.wait()

    def close(self) -> None:
        """Write the last values, and end the thread that writes."""
        self.flush()
        with contextlib.suppress(RunInUse):
            self._writer.close()

    def _end_phase(self) -> None:
        now = time.monotonic()
        if "phase" in self.values:
            self.seconds[self.values["phase"]] = self.seconds.get(self.values["phase"], 0.0) + now - self._phase_began
        self._phase_began, self.values["phase_since"] = now, time.time()

    def _put(self) -> None:
        if not self._is_put:  # else a disk is slow, and what it has not begun with takes these values along
            self._is_put, self._put_at = True, time.monotonic()
            self._writer.put(self._write)

    def _write(self) -> None:
        self._may_write()
        with self._changing:
            self._is_put = False
            values = {**self.values, "heartbeat": time.time()}
        try:
            _replace(self._path, values)
        except (InputError, MachineFailed) as failure:
            if not self._is_failing:
                log.warning("the status is not told, and the run goes on: %s", failure)
            self._is_failing = True
        else:
            if self._is_failing:
                log.info("%s is written again", self._path)
            self._is_failing = False


class NoStatus:
    """Tells nothing: for the ranks that do not speak."""

    values: Mapping[str, Any] = MappingProxyType({})
    seconds: Mapping[str, float] = MappingProxyType({})

    def update(self, **values: Any) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_status(run: Path, side: str) -> dict[str, Any]:
    """Return what one side last wrote, or an empty dictionary."""
    try:
        said = json.loads(_status_file(run, side).read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def write_end(run: Path, side: str, error: Exception) -> None:
    """Say in a side's status file that it cannot go on, and why. A refusal stays: other ranks only tell of its effects."""
    said = read_status(run, side)
    if phase_of(error) not in (REFUSED, MUST_NOT_GO_ON) and said.get("phase") in (REFUSED, MUST_NOT_GO_ON):
        return
    step = getattr(error, "step", None)
    more = {"phase": phase_of(error), "error": str(error), **({} if step is None else {"step": step})}
    with contextlib.suppress(InputError, MachineFailed):
        _replace(_status_file(run, side), {**said, **more})


def heartbeat_age_s(run: Path, side: str) -> float | None:
    """Return how long one side has not written its status, by the clock of the file server; None if it never did."""
    return seconds_since_written(_status_file(run, side))


def forget_status(run: Path, *sides: str) -> None:
    """Empty what sides last wrote, so that the words of an earlier start are not taken for those of the next.

    The file stays: it is the room in which an end can be told on a full disk.
    """
    for side in sides:
        with contextlib.suppress(OSError), open(_status_file(run, side), "r+b") as file:
            file.write(b"{}")
            file.truncate()


def _status_file(run: Path, side: str) -> Path:
    return run / "status" / f"{side}.json"


def _replace(path: Path, values: dict[str, Any]) -> None:
    """Write a status by rename; on a full disk the least of it, in place of what was there. Raises as `write_atomically`."""
    try:
        write_atomically(path, json.dumps(values))
    except MachineFailed as failed:
        if failed.__cause__ is not None and is_disk_full(failed.__cause__):
            # In the room that the file has; cut afterwards, or others would take what that frees.
            least = {key: values[key] for key in KEPT_ON_A_FULL_DISK if key in values}
            with contextlib.suppress(OSError), open(path, "r+b") as file:
                file.write(json.dumps(least).encode())
                file.truncate()
        raise
