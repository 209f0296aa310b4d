"""What a run has come to: its verdict or where it stands, what it warned of, and the table of its results.

All of it is read as it is there: runs of older versions have no verdict, no intervals and no warnings.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from launch.output import MEASURE_TITLES, title_of
from launch.phases import clock
from launch.report.history import History
from launch.status import SILENT_AFTER_S, has_ended
from trainer.errors import FAILED, FINISHED, MUST_NOT_GO_ON, REFUSED, STOPPED

DIFFERENCES = {"trained - untrained": ("trained", "untrained"), "trained - bm25": ("trained", "bm25")}


@dataclass(frozen=True)
class Row:
    """The measures of one model on the test queries."""

    name: str  # as in results.json
    title: str  # for people
    values: dict[str, float]
    intervals: dict[str, list[float]] = field(default_factory=dict)  # 95 %: low and high, by measure
    step: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What a person should know first. level: better, unclear, worse or collapsed, as the run judged itself; else open."""

    level: str
    sentence: str


def verdict_of(status: dict[str, Any]) -> Verdict:
    """Return what the run says of itself, or where it stands."""
    given = (status["results"] or {}).get("verdict")
    return Verdict(given["level"], given["sentence"]) if given else _where_it_stands(status)


def _where_it_stands(status: dict[str, Any]) -> Verdict:
    trainer = status["trainer"]
    if not trainer:
        return Verdict("open", "This run has not started: its trainer has told nothing yet.")
    phase = trainer.get("phase", "starting")
    at = f"step {trainer.get('step', 0):,} of {trainer.get('num_steps') or '?'}"
    because = f": {trainer['error'].rstrip('.')}." if trainer.get("error") else "."
    if phase == FINISHED:
        return Verdict("open", f"This run has ended at {at}. It holds no verdict: only negpool run judges a run at its end.")
    if phase == STOPPED:
        return Verdict("open", f"This run was stopped and saved at {at}. The command that started it goes on with it.")
    if phase == MUST_NOT_GO_ON:
        return Verdict("worse", f"This run was ended at {at}, because it would only have got worse{because}")
    if phase in (FAILED, REFUSED):
        return Verdict("worse", f"The trainer has ended at {at} with an error{because}")
    silent_s = trainer.get("heartbeat_age_s") or 0.0
    silent = f" It has been silent for {clock(silent_s)}, so it may be dead." if silent_s > SILENT_AFTER_S else ""
    return Verdict("open", f"This run has not ended: its trainer is {phase}, at {at}. The verdict comes at the end.{silent}")


def warnings_of(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what the verdict and both sides warn of, as (who, sentence), each sentence once."""
    of_side = {
        each["sentence"]: (side, each.get("step")) for side in ("trainer", "miner") for each in status[side].get("warnings") or []
    }
    verdict = (status["results"] or {}).get("verdict") or {}
    of_verdict = [each["sentence"] for each in verdict.get("warnings") or []]
    found = []
    for sentence in dict.fromkeys([*of_verdict, *of_side]):
        who, step = of_side.get(sentence, ("results", None))
        found.append((who, sentence if step is None else f"{sentence} (step {step:,})"))
    miner = status["miner"]
    if miner.get("refused"):
        found.append(("miner", f"A version was given up: {miner['refused']}"))
    if miner.get("error") and has_ended(miner):
        found.append(("miner", f"It has ended with an error: {miner['error']}"))
    return found


def rows_of(status: dict[str, Any], history: History) -> list[Row]:
    """Return the test measures of each model: the run's results, or what its evaluations say so far."""
    results = status["results"] or {}
    steps, intervals = results.get("steps") or {}, results.get("intervals") or {}
    names = [name for name in ("bm25", "untrained", "trained", "last") if name in results]
    if names:
        titles = {name: title_of(name, "last" in names) for name in names}
        values = {name: {key: float(results[name][key]) for key in MEASURE_TITLES} for name in names}
        return [Row(name, titles[name], values[name], _pairs(intervals.get(name)), steps.get(name)) for name in names]
    of_step = {0: "untrained", max(history.steps, default=-1): "trained"}
    measured = {step: line for step, line in history.measures.items() if "eval/mrr@10" in line and step in of_step}
    return [
        Row(of_step[step], title_of(of_step[step], False), {key: line[f"eval/{key}"] for key in MEASURE_TITLES}, {}, step)
        for step, line in measured.items()
    ]


def differences_of(status: dict[str, Any], rows: list[Row]) -> list[Row]:
    """Return the paired differences that the run has intervals of."""
    values, intervals = {row.name: row.values for row in rows}, (status["results"] or {}).get("intervals") or {}
    return [
        Row(name, f"{title_of(one, False)} - {title_of(other, False)}",
            {key: values[one][key] - values[other][key] for key in MEASURE_TITLES}, _pairs(intervals[name]))
        for name, (one, other) in DIFFERENCES.items()
        if intervals.get(name) and one in values and other in values
    ]  # fmt: skip


def _pairs(intervals: dict[str, Any] | None) -> dict[str, list[float]]:
    """Return low and high by measure; raises TypeError or ValueError for anything else."""
    return {measure: [float(low), float(high)] for measure, (low, high) in (intervals or {}).items()}


def state_of(status: dict[str, Any]) -> str:
    """Return the trainer's phase, step and last sign of life, in a few words."""
    trainer = status["trainer"]
    if not trainer:
        return "not started"
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(trainer["heartbeat"])) + " UTC" if "heartbeat" in trainer else "unknown"
    return f"{trainer.get('phase', 'starting')} at step {trainer.get('step', 0):,} of {trainer.get('num_steps', '?')}, {when}"
