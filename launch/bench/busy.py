"""How much of a stretch of work a GPU computes in, and how often the host waits for it."""

import contextlib
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from trainer.profile import ON_CPU, ON_GPU, union

WORK = {"cuda": ON_GPU, "cpu": ON_CPU}  # of a trace's events, what a device does
SYNCHRONISES = "called a synchronizing CUDA operation"  # in the warnings of torch.cuda.set_sync_debug_mode


def busy_share(work: Callable[[], Any], times: int, device: torch.device) -> float | None:
    """Return the share of the time from the first to the last operation in which a device has one; None: the trace has none."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU]) as profile:
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        return share_in_trace(Path(folder) / "trace.json", device.type)


def share_in_trace(trace: Path, device_type: str) -> float | None:
    """Return the same of a trace that torch.profiler has written."""
    events = json.loads(trace.read_text())["traceEvents"]
    spans = union((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in WORK[device_type] and "dur" in e)
    return sum(end - begin for begin, end in spans) / (spans[-1][1] - spans[0][0]) if spans else None


def count_waits(work: Callable[[], Any], device: torch.device) -> int:
    """Return how often the host waits for a GPU during some work: by operations that need its result, or by a call."""
    calls: list[str] = []
    waiting = ((torch.cuda, "synchronize"), (torch.cuda.Event, "synchronize"), (torch.cuda.Stream, "synchronize"))
    with contextlib.ExitStack() as stack:
        for owner, name in waiting:
            stack.enter_context(patch.object(owner, name, _counting(getattr(owner, name), calls)))
        said = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        work()
    return len(calls) + sum(SYNCHRONISES in str(warning.message) for warning in said or ())


def _counting(wait: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def counted(*args: Any, **options: Any) -> Any:
        calls.append(wait.__qualname__)
        return wait(*args, **options)

    return counted
