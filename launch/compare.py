"""`negpool compare`: several runs in one table: the settings that differ, the results, what the runs cost.

Runs that cannot be compared are compared all the same, with a sentence that says why their figures are not of one kind.
"""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.jobfile import HOW
from launch.output import MEASURE_TITLES, in_figures
from launch.report.before_after import measures_of_each
from launch.report.history import History, read_history
from launch.report.standing import Row, Verdict, rows_of, verdict_of, warnings_of
from launch.status import has_ended, reading, run_status
from trainer.errors import InputError
from trainer.evaluate import MEASURES
from trainer.handoff.manifest import TornVersion, read_manifest, versions
from trainer.verdict import FEWEST, intervals


@dataclass(frozen=True)
class Run:
    """What is read of one run."""

    name: str
    folder: Path
    status: dict[str, Any]
    history: History
    rows: list[Row]
    verdict: Verdict
    warnings: list[str]
    job: dict[str, Any]  # by section.key
    data_digest: str | None
    each_QM: np.ndarray | None  # the trained model's measures of each test query

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)


def read_runs(folders: list[Path]) -> list[Run]:
    """Return the runs; raises InputError, naming the folder, if one is no run, or if it stands there twice."""
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        named = ", ".join(map(str, folders))
        raise InputError(f"there is nothing to compare in {named}; name the folders of two or more different runs")
    return [_read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def compare_runs(runs: list[Run]) -> dict[str, Any]:
    """Return what the runs have in common and what not, for JSON and for tables."""
    return {
        "runs": [_facts(run) for run in runs],
        "settings": _differing([run.job for run in runs]),
        "paired": [found for run in runs[1:] if (found := _paired(runs[0], run))],
        "notes": _notes(runs),
    }


def _read_run(folder: Path, name: str) -> Run:
    with reading(folder):
        status, history = run_status(folder), read_history(folder)
        table = tomllib.loads((folder / "job.toml").read_text(encoding="utf-8"))
        job = {f"{section}.{key}": value for section, values in table.items() for key, value in values.items()}
        return Run(
            name=name,
            folder=folder,
            status=status,
            history=history,
            rows=rows_of(status, history),
            verdict=verdict_of(status),
            warnings=[sentence for _, sentence in warnings_of(status)],
            job=job,
            data_digest=_data_digest(folder),
            each_QM=measures_of_each(folder, "trained"),
        )


def _names(folders: list[Path]) -> list[str]:
    """Return the last part of each path, with more parts before it where two would be called the same."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]  # as they are named: a link has a name of its own
    depth = next(d for d in range(1, 1 + max(map(len, parts))) if len({part[-d:] for part in parts}) == len(parts))
    return ["/".join(part[-depth:]) for part in parts]


def _data_digest(folder: Path) -> str | None:
    """Return the digest of the data that a run was made with; None: it has kept nothing that says."""
    for version in [*reversed(versions(folder / "checkpoints")), *reversed(versions(folder / "negatives"))]:
        try:
            if digest := read_manifest(version).get("data_digest"):
                return str(digest)
        except TornVersion:
            continue
    return None


def _facts(run: Run) -> dict[str, Any]:
    history, trainer, results = run.history, run.status["trainer"], run.status["results"] or {}
    rates, losses = history.of_steps("tokens_per_rank_per_s")[1], history.of_steps("loss")[1]
    return {
        "name": run.name,
        "run": str(run.folder),
        "verdict": {"level": run.verdict.level, "sentence": run.verdict.sentence},
        "tested": run.row("trained") is not None,
        "warnings": run.warnings,
        "phase": trainer.get("phase"),
        "results": {row.name: row.values for row in run.rows},
        "intervals": {row.name: row.intervals for row in run.rows if row.intervals},
        "steps": max(history.steps, default=trainer.get("step", 0)),
        "num_steps": trainer.get("num_steps"),
        "seconds": results.get("seconds"),
        "versions_swapped": history.mined_swaps,
        "tokens_per_rank_per_s": float(np.median(rates)) if rates else None,
        "peak_memory_gib": max(history.of_steps("memory/peak_gib")[1], default=None),
        "last_loss": losses[-1] if losses else None,
    }


def _differing(jobs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the settings that differ, by name; None: not set. Where a run lies, and how it is made, is left out."""
    aside = {"run.folder", *(f"{section}.{key}" for section, key in HOW)}
    keys = dict.fromkeys(key for job in jobs for key in job if key not in aside)
    values = {key: [job.get(key) for job in jobs] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def _paired(first: Run, run: Run) -> dict[str, Any] | None:
    """Return how much more a run's trained model measures than the first run's, where both have measured the same queries."""
    a, b = first.each_QM, run.each_QM
    same = first.data_digest == run.data_digest is not None and _split(first) == _split(run)
    if a is None or b is None or not same or len(a) != len(b) or len(a) < 2:
        return None
    gain_QM = b - a
    differences = dict(zip(MEASURES, gain_QM.mean(0).tolist(), strict=True))
    found = dict(zip(MEASURES, intervals(gain_QM).tolist(), strict=True))
    measure = shared_measure([first, run])
    return {
        "run": run.name,
        "from": first.name,
        "sentence": _in_words(run.name, first.name, measure, differences[measure], found[measure], len(gain_QM)),
        "num_queries": len(gain_QM),
        "differences": differences,
        "intervals": found,
    }


def shared_measure(runs: list[Run]) -> str:
    """Return the measure by which runs are compared: their stop.measure, or nDCG@10 where they have several."""
    chosen = {run.job.get("stop.measure", "ndcg@10") for run in runs}
    return str(chosen.pop()) if len(chosen) == 1 else "ndcg@10"


def _in_words(name: str, other: str, measure: str, gain: float, interval: list[float], num_queries: int) -> str:
    is_clear = num_queries >= FEWEST and (interval[0] > 0 or interval[1] < 0)
    how = f"{'' if is_clear else 'not clearly '}{'worse' if gain < 0 else 'better'}"
    return f"{name} is {how} than {other}: {MEASURE_TITLES[measure]} {gain:+.3f}, 95 % interval {in_figures(interval, True)}."


def _notes(runs: list[Run]) -> list[str]:
    """Return what stands in the way of comparing, a sentence each."""
    notes = []
    digests = {run.data_digest for run in runs}
    paths = {_data_path(run) for run in runs}
    if len(digests - {None}) > 1 or (None in digests and len(paths) > 1):
        where = ", ".join(f"{run.name}: {_data_path(run)}" for run in runs)
        notes.append(f"The runs are of different data ({where}): compare each with its own BM25 and untrained model only.")
    for what, setting in (("tested", "eval.split"), ("evaluated on the way", "eval.dev_split"), ("trained", "data.train_split")):
        splits = {run.name: run.job.get(setting) for run in runs}
        if len(set(splits.values())) > 1:
            notes.append(
                f"The runs were {what} on different splits ({', '.join(f'{name}: {split}' for name, split in splits.items())})."
            )
    for run in runs:
        if not run.rows:
            notes.append(f"{run.name} has no test results. {run.verdict.sentence}")
        elif not has_ended(run.status["trainer"]):
            notes.append(f"{run.name} has not ended: its figures are those of now.")
    return notes


def _split(run: Run) -> Any:
    return run.job.get("eval.split")


def _data_path(run: Run) -> str:
    sources = {key: value for key, value in run.job.items() if key.startswith("sources.")}
    return ", ".join(str(source.get("path")) for source in sources.values()) or str(run.job.get("data.path"))
