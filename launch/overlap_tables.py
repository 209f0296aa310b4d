"""What `negpool bench overlap` found, as tables and sentences."""

from typing import Any

from launch.counted import counted
from launch.tables import Part, Sheet

NOT_REACHED = "not reached"


def overlap_parts(found: dict[str, Any]) -> list[Part]:
    """Return each side alone, both together by each division, what was reached when, and what that comes to."""
    title = (
        f"{found['job']}, {counted(found['steps'], 'step')}, {counted(found['units'], found['unit'])}, {found['device']}, "
        f"medians of {counted(found['rounds'], 'round')}"
    )
    parts: list[Part] = [_alone(f"alone: {title}", found), _speeds(found), _ages(found)]
    if any(any(row["courses"]) for row in found["divisions"]):
        parts.append(_reached(found))
    return [*parts, *_sentences(found)]


def _alone(title: str, found: dict[str, Any]) -> Sheet:
    what = {"trainer": "a step", "miner": "a refresh"}
    rows = [
        (
            f"{row['side']} on {counted(row['units'], found['unit'])}, {what[row['side']]}",
            f"{row['seconds']:.2f}",
            _spread(row["of_rounds"]),
        )
        for row in found["alone"]
    ]
    return Sheet(title, ("", "seconds", "of the rounds"), rows)


def _speeds(found: dict[str, Any]) -> Sheet:
    columns = (
        "miner's share",
        "step, s",
        "times alone",
        "refresh, s",
        "refresh, times alone",
        "of the cores' time, trainer",
        "of the cores' time, miner",
    )
    rows = [
        (
            row["words"],
            f"{row['step_s']:.2f}",
            f"{row['step_slow_down']:.2f}",
            _or_none(row["refresh_s"], ".1f"),
            _or_none(row["refresh_slow_down"], ".2f"),
            _or_none(row["trainer_share"], ".0%"),
            _or_none(row["miner_share"], ".0%"),
        )
        for row in found["divisions"]
    ]
    return Sheet("together: a step beside a miner at work, and a refresh, against alone with the same", columns, rows)


def _ages(found: dict[str, Any]) -> Sheet:
    rows = [
        (
            row["words"],
            _or_none(row["mean_age_steps"], ".1f"),
            _or_none(row["max_age_steps"], ".0f"),
            _or_none(row["mined_from_step"], ".0f"),
            _or_none(row["versions_swapped"], ".3g"),
            f"{row['minutes']:.1f}",
        )
        for row in found["divisions"]
    ]
    columns = ("miner's share", "age, steps, mean", "largest", "mined from step", "versions swapped", "minutes, start to end")
    return Sheet("together: negatives in force", columns, rows)


def _reached(found: dict[str, Any]) -> Sheet:
    rows = [
        (row["words"], _scores(row["courses"], 0), _scores(row["courses"], -1), _times(row["minutes_to_target"], found["target"]))
        for row in found["divisions"]
    ]
    alone = found["courses_alone"]
    rows.append(("trainer alone, negatives of BM25", _scores(alone, 0), _scores(alone, -1), ""))
    goal = "" if found["target"] is None else f" of {found['target']:.4g}"
    columns = ("miner's share", "untrained", "at the end", f"minutes to MRR@10{goal}")
    return Sheet(f"MRR@10 on {found['split']}, {counted(found['queries'], 'query')}, each round", columns, rows)


def _sentences(found: dict[str, Any]) -> list[Part]:
    said: list[Part] = list(found["notes"])
    if found["split"] is not None:
        said.append("Minutes begin when a run is started. The trainer alone was given version 0, which the others wait for.")
    target, first = found["target"], found["soonest"]
    if target is None and found["split"] is not None:
        said.append("No share ended above the untrained model in every round, so none reached anything first; set --target.")
    if target is not None and not found["target_is_given"]:
        said.append(f"The target, {target:.4g}, is what the run with the lowest end reached.")
    if target is not None and first is None:
        said.append(f"No share reached {target:.4g} in every round.")
    if first is not None:
        how = "sooner in each round than any other share in any" if first["is_clear"] else "which is not clear: see the rounds"
        how = how if found["rounds"] > 1 else "in one round, which says little"
        said.append(f"MRR@10 of {target:.4g} is reached soonest with {first['words']}: {first['minutes']:.1f} minutes, {how}.")
    return said


def _or_none(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _spread(values: list[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}"


def _scores(courses: list[list[dict[str, Any]]], end: int) -> str:
    return ", ".join(f"{course[end]['mrr@10']:.3f}" for course in courses if course)


def _times(minutes: list[float | None], target: float | None) -> str:
    if target is None:
        return ""
    return ", ".join(NOT_REACHED if each is None else f"{each:.1f}" for each in minutes)
