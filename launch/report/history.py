"""What a run folder tells of the past: figures by step and by version of the negatives.

A run that was killed and resumed did some steps twice; what it wrote last counts.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.scores import read_scores

Series = tuple[list[float], list[float]]  # places, ascending, and values


@dataclass(frozen=True)
class History:
    """The lines of both sides' logs."""

    steps: dict[int, dict[str, Any]]  # by number of the step, from 1
    measures: dict[int, dict[str, Any]]  # "dev/…", "eval/…" and "health/…", by steps done
    swaps: list[tuple[int, int]]  # (step, version) of each version that came into force
    versions: dict[int, dict[str, Any]] = field(default_factory=dict)  # what the miner said of each version

    @property
    def mined_swaps(self) -> int:
        """How many versions that a model mined came into force; version 0 is BM25's."""
        return sum(version > 0 for _, version in self.swaps)

    def of_steps(self, name: str) -> Series:
        """Return a figure of the steps that have it."""
        return _series(self.steps, name)

    def of_measures(self, name: str) -> Series:
        """Return a figure of the evaluations that have it."""
        return _series(self.measures, name)


def read_history(run: Path) -> History:
    """Return the history of a run; empty where nothing was written yet, lines that a crash tore left out."""
    steps: dict[int, dict[str, Any]] = {}
    measures: dict[int, dict[str, Any]] = {}
    swaps: dict[int, int] = {}
    for line in _lines(run / "logs" / "metrics.jsonl"):
        if "loss" in line:
            steps[line["step"]] = line
        elif "event" not in line:
            measures.setdefault(line["step"], {}).update(line)
        elif line["event"] == "negatives swapped":
            swaps[line["step"]] = line["negatives/version"]
    if start := _start_on_dev(run):
        measures[0] = start | measures.get(0, {})
    versions = {line["version"]: line for line in _lines(run / "logs" / "miner.jsonl") if line.get("event") == "published"}
    return History(
        dict(sorted(steps.items())), dict(sorted(measures.items())), sorted(swaps.items()), dict(sorted(versions.items()))
    )


def _start_on_dev(run: Path) -> dict[str, Any]:
    """Return what the untrained model measured on dev, where the run has kept it."""
    try:
        kept = read_scores(run, "dev/untrained")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {} if kept is None else {"step": 0, **{f"dev/{name}": value for name, value in kept.measures.items()}}


def _series(lines: dict[int, dict[str, Any]], name: str) -> Series:
    found = [(step, line[name]) for step, line in lines.items() if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found
