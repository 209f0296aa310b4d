"""A folder of trials: a JSON file for each, with all that must be the same for two of them to stand in one table.

Each is written by one rename as soon as it is measured, so that a benchmark that was interrupted keeps what it has, and the same
command goes on with what is missing.
"""

import dataclasses
import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.bench.scaling.trials import Trial
from launch.jobfile import HOW, Jobs, write_job
from launch.versions import code_version
from trainer.errors import InputError
from trainer.handoff.manifest import write_atomically

OF_RANKS = ("commit", "is_modified", "device", "torch", "threads")  # fields that ranks report


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What all trials of one table have in common."""

    job: str  # the job's digest
    data: str
    warm_up: int  # steps
    steps: int
    commit: str | None = None  # None, here and below: not known before a trial
    is_modified: bool | None = None
    torch: str | None = None
    device: str | None = None
    threads: int | None = None  # of a rank

    def refuse_other(self, other: "Conditions", where: str, other_where: str, advice: str) -> None:
        """Raise InputError, naming both, where a field that both sides know is not the same."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if None not in (mine, theirs) and mine != theirs:
                pair = self._in_words(field.name), other._in_words(field.name)
                raise InputError(
                    f"{where} was measured {pair[0]}, and {other_where} {pair[1]}, which no table compares; {advice}"
                )

    def _in_words(self, name: str) -> str:
        if name in ("commit", "is_modified"):
            return f"with commit {str(self.commit)[:12]}{' and changes to it' if self.is_modified else ''}"
        value = getattr(self, name)
        words = {"job": "with job {}", "data": "on data {}", "device": "on {}", "torch": "with torch {}"}
        return words.get(name, f"with {name.replace('_', ' ')} {{}}").format(value)


def conditions_here(jobs: Jobs, data: str, warm_up: int, steps: int) -> Conditions:
    """Return the conditions of a trial that would be started now; the hardware is the ranks' to tell."""
    import torch

    commit, is_modified = code_version()
    asked = Conditions(job=digest_of(jobs), data=data, warm_up=warm_up, steps=steps)
    return dataclasses.replace(asked, commit=commit, is_modified=is_modified, torch=torch.__version__)


def digest_of(jobs: Jobs) -> str:
    """Return a short digest of all settings that say what is computed."""
    return hashlib.sha256(json.dumps(_settings(jobs.resolved()), sort_keys=True).encode()).hexdigest()[:12]


class TrialFolder:
    """Trials that were measured; of one kind only, or nothing can be done with them."""

    def __init__(self, folder: Path):
        """Raises InputError for a file that cannot be read, and for trials of two kinds."""
        self.folder = folder
        self.job_file = folder / "job.toml"
        self.results: dict[Trial, dict[str, Any]] = {}
        self._conditions: dict[Trial, Conditions] = {}
        for file in sorted(folder.glob("trials/ranks-*.json")):
            trial, conditions, result = _read(file)
            self._refuse_mixed(trial, conditions, f"delete one of them in {folder / 'trials'}")
            self._add(trial, conditions, result)

    def begin(self, jobs: Jobs, conditions: Conditions) -> None:
        """Keep the job; raises InputError where the folder has trials of another one, or under other conditions."""
        for trial, kept in self._conditions.items():
            if kept.job != conditions.job and (difference := self._difference(jobs)):
                raise InputError(f"{self._file(trial)} was measured with {difference}; {self._advice}")
            kept.refuse_other(conditions, str(self._file(trial)), "this would be", self._advice)
        if not self._conditions:
            write_job(self.job_file, jobs)

    def keep(self, trial: Trial, conditions: Conditions, result: dict[str, Any]) -> None:
        """Write what was measured; raises InputError, and writes nothing, where the ranks saw another commit or machine."""
        seen = dataclasses.replace(conditions, **{name: result[name] for name in OF_RANKS})
        self._refuse_mixed(trial, seen, self._advice)
        kept = {"trial": dataclasses.asdict(trial), "conditions": dataclasses.asdict(seen), "result": result}
        write_atomically(self._file(trial), json.dumps(kept, indent=1) + "\n")
        self._add(trial, seen, result)

    @property
    def conditions(self) -> Conditions:
        """Those of all trials, of which there is one."""
        return next(iter(self._conditions.values()))

    @property
    def _advice(self) -> str:
        return f"set --out to another folder, or delete {self.folder} to begin anew"

    def _file(self, trial: Trial) -> Path:
        return self.folder / "trials" / f"{trial.name}.json"

    def _add(self, trial: Trial, conditions: Conditions, result: dict[str, Any]) -> None:
        self.results[trial], self._conditions[trial] = result, conditions

    def _refuse_mixed(self, trial: Trial, conditions: Conditions, advice: str) -> None:
        for other, kept in self._conditions.items():
            kept.refuse_other(conditions, str(self._file(other)), f"{self._file(trial).name}", advice)

    def _difference(self, jobs: Jobs) -> str | None:
        """Return the first setting in which the kept job differs, with both values."""
        try:
            before = _settings(tomllib.loads(self.job_file.read_text()))
        except (OSError, tomllib.TOMLDecodeError):
            return None
        now = _settings(jobs.resolved())
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                return f"{name}={before.get(name)!r}, and this job has {now.get(name)!r}"
        return None


def _settings(resolved: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a resolved job by section.key, but for those that say where something is made."""
    sections = {section: keys for section, keys in resolved.items() if section != "run"}
    return {f"{s}.{k}": value for s, keys in sections.items() for k, value in keys.items() if (s, k) not in HOW}


def _read(file: Path) -> tuple[Trial, Conditions, dict[str, Any]]:
    try:
        kept = json.loads(file.read_text())
        return Trial(**kept["trial"]), Conditions(**kept["conditions"]), kept["result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no trial of negpool bench scaling ({error}); delete it, and it is measured again") from error
