"""What all cases came to: medians over the rounds, slow-downs against alone, and the division that reaches a target soonest."""

import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.bench.overlap.cases import Case
from launch.bench.overlap.course import time_to_reach
from launch.bench.overlap.dev_scores import MEASURE
from launch.bench.overlap.division import Division, Hardware

Results = Mapping[str, dict[str, Any]]  # by the name of a case
AGES = ("mean_age_steps", "max_age_steps", "versions_swapped", "mined_from_step")


def summarise(cases: Sequence[Case], results: Results, hardware: Hardware, target: float | None) -> dict[str, Any]:
    """Return the figures of both sides alone and of each division, and which division is the soonest."""
    of_rounds = {case: [results[name] for name in _rounds_of(case, cases)] for case in cases if case.round == 1}
    alone: dict[tuple[str, int], list[float]] = {
        (case.sides, case.units): _seconds_alone(found) for case, found in of_rounds.items() if case.division is None
    }
    together = {case.division: found for case, found in of_rounds.items() if case.division is not None}
    courses = {division: [result.get("course", []) for result in found] for division, found in together.items()}
    chosen = target if target is not None else target_of_all([course for each in courses.values() for course in each])
    rows = []
    for division, found in together.items():
        times = [None if chosen is None else time_to_reach(chosen, _points(course)) for course in courses[division]]
        given = {"miner_share": division.mine_units / hardware.num_units} if len(hardware.gpus) > 1 else {}
        words = {"words": division.on(hardware), "minutes_to_target": times, "courses": courses[division]}
        rows.append({**_figures(division, found, alone), **given, **words})
    return {
        "alone": [
            {"side": side, "units": units, "seconds": statistics.median(seconds), "of_rounds": seconds}
            for (side, units), seconds in alone.items()
        ],
        "divisions": rows,
        "target": chosen,
        "target_is_given": target is not None,
        "soonest": soonest(rows),
        "courses_alone": [result.get("course", []) for result in of_rounds[cases[0]]],  # the trainer on the whole machine
    }


def _rounds_of(case: Case, cases: Sequence[Case]) -> list[str]:
    """Return the names of a case in all rounds, in their order."""
    same = [other for other in cases if (other.sides, other.units, other.division) == (case.sides, case.units, case.division)]
    return [other.name for other in sorted(same, key=lambda other: other.round)]


def _seconds_alone(of_rounds: list[dict[str, Any]]) -> list[float]:
    """Return the time of a step of the trainer alone, or of a refresh of the miner alone, of each round."""
    return [float(r["step_s"] if "step_s" in r else statistics.median(r["refreshes_s"])) for r in of_rounds]


def _figures(division: Division, of_rounds: list[dict[str, Any]], alone: Mapping[tuple[str, int], list[float]]) -> dict[str, Any]:
    """Return the medians over the rounds of one division.

    Slow-downs are medians of each round's ratio to the same round alone: a step beside a miner at work, and a refresh.
    """
    steps = [result["beside_miner_s"] or result["step_s"] for result in of_rounds]
    refreshes = [statistics.median(result["refreshes_s"]) if result["refreshes_s"] else None for result in of_rounds]
    train, mine = alone["trainer", division.train_units], alone["miner", division.mine_units]
    return {
        "division": division.name,
        "train_units": division.train_units,
        "mine_units": division.mine_units,
        "miner_share": _median(of_rounds, lambda result: result.get("share_of_cores", {}).get("miner")) or division.memory_share,
        "trainer_share": _median(of_rounds, lambda result: result.get("share_of_cores", {}).get("trainer")),
        "step_s": statistics.median(steps),
        "mean_step_s": _median(of_rounds, lambda result: result["mean_step_s"]),
        "step_slow_down": _ratio(steps, train),
        "refresh_s": _median(refreshes, lambda seconds: seconds),
        "refresh_slow_down": _ratio(refreshes, mine),
        "minutes": _median(of_rounds, lambda result: (result["ended_at"] - result["started_at"]) / 60),
        **{name: _median(of_rounds, operator.itemgetter(name)) for name in AGES},
        "mean_ages_of_rounds": [result["mean_age_steps"] for result in of_rounds],
    }


def _median(found: Sequence[Any], of: Callable[[Any], float | None]) -> float | None:
    """Return the median of what the rounds have; None where none has it."""
    values = [value for each in found if each is not None and (value := of(each)) is not None]
    return statistics.median(values) if values else None


def _ratio(seconds: Sequence[float | None], alone: Sequence[float]) -> float | None:
    """Return the median of the ratios, round by round."""
    ratios = [each / other for each, other in zip(seconds, alone, strict=True) if each is not None]
    return round(statistics.median(ratios), 3) if ratios else None


def _points(course: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(point["minutes"], point[MEASURE]) for point in course]


def target_of_all(courses: Sequence[list[dict[str, Any]]]) -> float | None:
    """Return what the run with the lowest end reached, so that every run has reached it; None where that is no gain."""
    if not courses or not all(courses):
        return None
    lowest = min(course[-1][MEASURE] for course in courses)
    return float(lowest) if lowest > max(course[0][MEASURE] for course in courses) else None


def soonest(divisions: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the division that reached the target first, by the median of the rounds; None where none did in every round.

    It is clear where its slowest round, of several, was before the fastest round of each other division.
    """
    reached = [row for row in divisions if row["minutes_to_target"] and None not in row["minutes_to_target"]]
    if not reached:
        return None
    first, *others = sorted(reached, key=lambda row: statistics.median(row["minutes_to_target"]))
    is_clear = len(first["minutes_to_target"]) > 1 and all(
        max(first["minutes_to_target"]) < min(row["minutes_to_target"]) for row in others
    )
    minutes = statistics.median(first["minutes_to_target"])
    return {"division": first["division"], "words": first["words"], "minutes": minutes, "is_clear": is_clear}
