"""The cases that were measured: a JSON file for each, and what all of them must have in common to stand in one table.

Each is written by one rename as soon as it is measured. A benchmark that was interrupted keeps what it has, and the same command
goes on with what is missing.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from launch.bench.overlap.division import Hardware
from launch.jobfile import HOW, Jobs
from launch.versions import code_version
from trainer.errors import InputError
from trainer.handoff.manifest import write_atomically


def conditions_of(jobs: Jobs, data_digest: str, hardware: Hardware, device: dict[str, Any]) -> dict[str, Any]:
    """Return what all cases of one table have in common, in the words of an error. device: as `machine.describe` has it."""
    commit, is_modified = code_version()
    return {
        "job": digest_of(jobs),
        "data": data_digest[:12],
        "commit": commit + (", changed" if is_modified else ""),
        "hardware": f"{device['device']}, {hardware.cores} cores, {len(hardware.gpus)} GPUs",
        "torch": device["torch"],
    }


def digest_of(jobs: Jobs) -> str:
    """Return a short digest of all settings that say what is computed."""
    sections = {section: keys for section, keys in jobs.resolved().items() if section != "run"}
    sections["run"] = {"seed": jobs.train.run.seed}
    values = {f"{s}.{k}": value for s, keys in sections.items() for k, value in keys.items() if (s, k) not in HOW}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


class KeptCases:
    """What was measured in a folder, under one set of conditions."""

    def __init__(self, folder: Path, conditions: dict[str, Any]):
        """Raises InputError for a file that cannot be read, and for one that was measured under other conditions."""
        self._folder, self._conditions = folder / "cases", conditions
        self.results = {file.stem: self._read(file) for file in sorted(self._folder.glob("*.json"))}

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Write what was measured."""
        kept = {"conditions": self._conditions, "result": result}
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / f"{name}.json", json.dumps(kept, indent=1) + "\n")
        self.results[name] = result

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            kept = json.loads(file.read_text())
            conditions, result = dict(kept["conditions"]), dict(kept["result"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is no case that was measured ({error}); delete it, and it is measured again") from error
        for name, now in self._conditions.items():
            if conditions.get(name) != now:
                raise InputError(
                    f"{file} was measured with another {name}, {conditions.get(name)}, and this one is {now}; no table compares "
                    "them: set --out to another folder, or delete this one to begin anew"
                )
        return result
