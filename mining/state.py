"""What a service that was killed needs in order to make the same version again: its number and its checkpoint.

Everything else is on disk already (shards) or follows from the seed.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from trainer.handoff.manifest import write_atomically


@dataclass(frozen=True)
class Refresh:
    """A version that is being made."""

    version: int
    checkpoint: str  # name of its folder
    weights_digest: str


def write_refresh(run: Path, refresh: Refresh, phase: str) -> None:
    """Keep what is being made, and the phase it is in."""
    write_atomically(_path(run), json.dumps({**vars(refresh), "phase": phase}))


def read_refresh(run: Path) -> Refresh | None:
    """Return what was being made when a service last wrote, or None."""
    try:
        kept = json.loads(_path(run).read_text())
        return Refresh(kept["version"], kept["checkpoint"], kept["weights_digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget_refresh(run: Path) -> None:
    """Let the next look choose anew what is made."""
    _path(run).unlink(missing_ok=True)


def _path(run: Path) -> Path:
    return run / "status" / "miner.refresh.json"
