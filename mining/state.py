"""What a service that was killed needs in order to go on: one small file, in which each story has an entry of its own.

The version that is being made and its checkpoint, whose embeddings of passages each version took, and which index was chosen.
Everything else is on disk already (shards, drawn parts, centroids) or follows from the seed. Rank 0 alone writes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.handoff.manifest import write_atomically

REFRESH = "refresh"


@dataclass(frozen=True)
class Refresh:
    """A version that is being made."""

    version: int
    checkpoint: str  # name of its folder
    weights_digest: str


def read_state(run: Path, name: str) -> Any:
    """Return an entry as it was written last, or None if there is none that can be read."""
    return _read(run).get(name)


def write_state(run: Path, name: str, entry: Any) -> None:
    """Replace an entry, JSON; None: forget it. Raises as `write_atomically`."""
    state = {**_read(run), name: entry}
    write_atomically(_path(run), json.dumps({key: value for key, value in state.items() if value is not None}))


def write_refresh(run: Path, refresh: Refresh, phase: str) -> None:
    """Keep what is being made, and the phase it is in."""
    write_state(run, REFRESH, {**vars(refresh), "phase": phase})


def read_refresh(run: Path) -> Refresh | None:
    """Return what was being made when a service last wrote, or None."""
    try:
        kept = read_state(run, REFRESH)
        return Refresh(kept["version"], kept["checkpoint"], kept["weights_digest"])
    except (KeyError, TypeError):
        return None


def forget_refresh(run: Path) -> None:
    """Let the next look choose anew what is made."""
    if read_state(run, REFRESH) is not None:
        write_state(run, REFRESH, None)


def _read(run: Path) -> dict[str, Any]:
    try:
        state = json.loads(_path(run).read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _path(run: Path) -> Path:
    return run / "status" / "miner.state.json"
