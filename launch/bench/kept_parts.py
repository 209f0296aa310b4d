"""Finished parts of a long benchmark, kept in a folder: one that was interrupted goes on behind them.

A part is a JSON file with what it was measured with: commit, hardware, options. Parts of another commit, machine or options are
refused, because rows of different ones do not belong into one table.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch.output import messages
from trainer.errors import InputError
from trainer.handoff.manifest import write_atomically


class KeptParts:
    """The parts in a folder."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        """Take over what the folder has; raises InputError if it is of something else.

        identity: what must be the same for all parts, as JSON has it.
        """
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        for file in sorted(folder.glob("*.json")):
            self._refuse_other(file)

    def part(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a part, measured now or before; raises InputError if the disk refuses it."""
        file = self.folder / f"{name}.json"
        if file.exists():
            messages().print(f"[dim]{name}: kept from before in {file}[/dim]")
            return json.loads(file.read_text())["found"]
        found = measure()
        write_atomically(file, json.dumps({"identity": self.identity, "found": found}, indent=1))
        return found

    def clear(self) -> None:
        """Delete the parts, when the whole is written."""
        for file in self.folder.glob("*.json"):
            file.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _refuse_other(self, file: Path) -> None:
        try:
            kept = json.loads(file.read_text())["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is no part of a benchmark; delete it, or set --out to another folder") from error
        for name in {**kept, **self.identity}:
            if kept.get(name) != self.identity.get(name):
                raise InputError(
                    f"{file} was measured with {name}={kept.get(name)!r}, and this is {name}={self.identity.get(name)!r}; "
                    "they do not belong into one table: set --out to another folder, or delete the old one"
                )
