"""A profile of some steps: a trace that a person looks at, and the share of their time in which the device was busy.

It changes no number of the run, and costs time in its own steps alone. Each rank writes its own trace; rank 0 tells.
"""

import gzip
import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trainer.world import World

log = logging.getLogger(__name__)

# What the events of a trace are called that say when a device was at work. A GPU's timeline also repeats the host's marks.
ON_GPU, ON_CPU = ("kernel", "gpu_memcpy", "gpu_memset"), ("cpu_op",)
MARK = "step "  # how the names of the steps' own marks begin
Interval = tuple[float, float]  # begin and end, in one unit


class Profile(Protocol):
    """Told before and behind each step, by the number that the log gives it, and when the run ends for whatever reason."""

    def before_step(self, number: int) -> None: ...

    def after_step(self, number: int) -> None: ...

    def close(self) -> None: ...


class NoProfile:
    """Looks at nothing."""

    def before_step(self, number: int) -> None:
        """Do nothing."""

    def after_step(self, number: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TorchProfile:
    """PyTorch's profiler over the steps of a range."""

    def __init__(self, steps: range, world: World, logs: Path, tell: Callable[[int, dict[str, Any]], None]):
        """logs: the folder of the trace. tell: records a step's figures."""
        self._steps, self._world, self._tell = steps, world, tell
        self._path = logs / f"profile-rank{world.rank}.json.gz"
        self._profiler: profile | None = None
        self._mark: record_function | None = None
        self._done: list[int] = []

    def before_step(self, number: int) -> None:
        """Begin with the first of the steps, and mark each."""
        if number not in self._steps:
            return
        if self._profiler is None:
            self._wait_for_device()  # for what earlier steps have left to it
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._world.device.type == "cuda")
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()
        self._mark = record_function(f"{MARK}{number}")
        self._mark.__enter__()

    def after_step(self, number: int) -> None:
        """End the step's mark, and behind the last write the trace."""
        if self._mark is None:
            return
        self._done.append(number)
        if number == self._steps[-1]:
            self._wait_for_device()  # for what the step has left to it, which is its time
        self._end_mark()
        if number == self._steps[-1]:
            self._write()

    def close(self) -> None:
        """Write what there is, where the run ends among the steps."""
        self._end_mark()
        if self._profiler is not None:
            self._write()

    def _end_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
        self._mark = None

    def _write(self) -> None:
        assert self._profiler is not None
        profiler, self._profiler = self._profiler, None
        try:
            profiler.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._path))
            if self._world.speaks and self._done:
                self._report()
        except (OSError, RuntimeError, ValueError) as error:  # of the profiler or the disk: no reason to end a run
            log.warning("no profile: %s", error)

    def _report(self) -> None:
        is_cuda = self._world.device.type == "cuda"
        with gzip.open(self._path) as file:
            share = busy_share(json.load(file)["traceEvents"], ON_GPU if is_cuda else ON_CPU)
        name = "profile/gpu_busy_share" if is_cuda else "profile/operators_share"
        self._tell(self._done[-1], {"event": "profile", "profile/num_steps": len(self._done), name: round(share, 4)})
        percent = f"{100 * share:.1f} % of their time"
        found = f"the GPU was busy for {percent}" if is_cuda else f"torch's operators took {percent}, Python the rest"
        log.info(
            "steps %d to %d: %s; open %s with https://ui.perfetto.dev (Open trace file)",
            self._done[0], self._done[-1], found, self._path,
        )  # fmt: skip

    def _wait_for_device(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)


def open_profile(
    asked: range, to_do: range, world: World, logs: Path, tell: Callable[[int, dict[str, Any]], None]
) -> TorchProfile | NoProfile:
    """Return the profile of the steps that are asked for, of those to do; other arguments as `TorchProfile` has them."""
    steps = range(max(asked.start, to_do.start), min(asked.stop, to_do.stop))
    if len(steps):
        return TorchProfile(steps, world, logs, tell)
    if len(asked) and world.speaks:
        log.warning('profile.steps="%d:%d" has none of the steps from %d on; no trace', asked.start, asked.stop, to_do.start)
    return NoProfile()


def busy_share(events: Iterable[dict[str, Any]], kinds: tuple[str, ...]) -> float:
    """Return the share of the marked steps' time in which events of some kinds ran, however many at once.

    events: of a trace in Chrome's form, times in microseconds; 0.0 where no step is marked.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    marks = [_interval(e) for e in timed if e.get("cat") == "user_annotation" and re.fullmatch(rf"{MARK}\d+", e["name"])]
    return covered([_interval(event) for event in timed if event.get("cat") in kinds], marks)


def covered(intervals: Iterable[Interval], windows: Iterable[Interval]) -> float:
    """Return the share of the windows that the union of the intervals covers; 0.0 for no windows. Each may overlap others."""
    merged, wanted = union(intervals), union(windows)
    total = sum(end - begin for begin, end in wanted)
    inside, first = 0.0, 0
    for begin, end in wanted:
        while first < len(merged) and merged[first][1] <= begin:
            first += 1
        place = first
        while place < len(merged) and merged[place][0] < end:
            inside += min(end, merged[place][1]) - max(begin, merged[place][0])
            place += 1
    return inside / total if total else 0.0


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return disjoint intervals, ascending, that cover what the given ones do."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]
