"""How a run went, from its logs: steps, refreshes, ages of the negatives, and when a measure was reached.

Pure functions of what `read_history` finds; times are seconds, `at` is a time of day as `time.time` has it.
"""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from launch.report.history import History

WARM_UP = 2  # steps in which a process sets itself up
Points = Sequence[tuple[float, float]]  # when, and what was measured then


def describe_steps(history: History) -> dict[str, Any]:
    """Return the times of a run's steps but for the first ones: of all, and of those beside a miner at work."""
    lines = list(history.steps.values())
    told = lines[WARM_UP:] or lines
    seconds = [line["time/step_s"] for line in told]
    beside = [line["time/step_s"] for line in told if _is_beside(line, _refresh_times(history))]
    return {
        "steps": len(lines),
        "step_s": statistics.median(seconds),
        "mean_step_s": statistics.fmean(seconds),
        "beside_miner_s": statistics.median(beside) if beside else None,
        "steps_beside_miner": len(beside),
        "begun_at": lines[0]["time"] - lines[0]["time/step_s"],
        "ended_at": lines[-1]["time"],
    }


def refresh_seconds(history: History) -> list[float]:
    """Return how long each refresh took that led to a version, in order; version 0 is BM25's, and none."""
    return [sum(line["seconds"].values()) for version, line in history.versions.items() if version > 0]


def _refresh_times(history: History) -> list[tuple[float, float]]:
    """Return when each version was begun and published; what was not published is not told."""
    return [(line["time"] - sum(line["seconds"].values()), line["time"]) for line in history.versions.values()]


def _is_beside(step: dict[str, Any], refreshes: list[tuple[float, float]]) -> bool:
    """Tell whether the miner was at work for more than half of a step."""
    ended, seconds = step["time"], step["time/step_s"]
    overlaps = (min(ended, end) - max(ended - seconds, begin) for begin, end in refreshes)
    return sum(max(0.0, overlap) for overlap in overlaps) > seconds / 2


def describe_ages(history: History) -> dict[str, Any]:
    """Return how old mined negatives were in the steps that drew from them: steps since the checkpoint they were mined from."""
    steps, ages = history.of_steps("negatives/age_steps")
    return {
        "mean_age_steps": statistics.fmean(ages) if ages else None,
        "max_age_steps": max(ages, default=None),
        "mined_from_step": steps[0] if steps else None,  # the first that drew from mined negatives
        "versions_swapped": history.mined_swaps,
    }


def step_times(history: History, steps: Sequence[int], started_at: float) -> list[float]:
    """Return when each of the steps was done, in minutes since a start; step 0: when the first one began."""
    begun_at = describe_steps(history)["begun_at"]
    at = [begun_at if step == 0 else history.steps[step]["time"] for step in steps]
    return [round((each - started_at) / 60, 4) for each in at]


def time_to_reach(target: float, points: Points) -> float | None:
    """Return when a measure first reached a target, linear between two points; None: it never did. points: in order of time."""
    if points and points[0][1] >= target:
        return points[0][0]
    for (before, low), (after, high) in itertools.pairwise(points):
        if low < target <= high:
            return before + (after - before) * (target - low) / (high - low)
    return None
