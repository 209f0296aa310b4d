"""Checkpoints as the miner and the user see them: the `encoder/` folder and what the manifest says of it.

The trainer's own `state/` lies beside it and is `trainer/checkpoint.py`'s business.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.handoff.manifest import TornVersion, open_version, read_latest, versions

ENCODER = "encoder/"  # what of a checkpoint the miner and the user open


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint."""

    folder: Path
    step: int
    manifest: dict[str, Any]  # weights_digest, data_digest, seconds, is_final, …

    @property
    def encoder_folder(self) -> Path:
        return self.folder / "encoder"


def checkpoints_folder(run: Path) -> Path:
    return run / "checkpoints"


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def open_checkpoint(folder: Path, only: str = "") -> Checkpoint:
    """Return a checkpoint after verifying every file; raises TornVersion, naming the file.

    only: as `open_version` takes it; ENCODER for who reads the encoder alone.
    """
    manifest = open_version(folder, only)
    if not isinstance(manifest.get("step"), int):
        raise TornVersion(f"{folder} is no checkpoint: its manifest names no step")
    return Checkpoint(folder, manifest["step"], manifest)


def newest_checkpoint(run: Path, on_torn=lambda _: None, only: str = "") -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None; on_torn is called with each TornVersion passed over.

    LATEST is tried first: after a roll-back it names an older step than the newest folder.
    """
    parent = checkpoints_folder(run)
    newest_first = sorted(versions(parent), reverse=True)
    latest = read_latest(parent)
    for folder in sorted(newest_first, key=lambda f: f.name != latest):
        try:
            return open_checkpoint(folder, only)
        except TornVersion as torn:
            on_torn(torn)
    return None


def steps_on_disk(run: Path) -> list[int]:
    """Return the steps of all published checkpoints, ascending, unverified."""
    return [int(folder.name.removeprefix("step-")) for folder in versions(checkpoints_folder(run))]
