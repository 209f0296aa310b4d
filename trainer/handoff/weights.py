"""Checkpoints as the miner and the user see them: the `encoder/` folder and what the manifest says of it.

The trainer's own `state/` lies beside it and is `trainer/checkpoint.py`'s business.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.handoff.manifest import TornVersion, open_version, read_latest, versions, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

BEST = "BEST"  # beside LATEST, one line: the checkpoint that stands for the run
ENCODER, STATE = "encoder/", "state/"  # what of a checkpoint the miner and the user open, and what only the trainer does


class NotFiniteVersion(TornVersion):
    """A checkpoint is whole, and holds NaN or infinity: written before updates that are not finite were left out."""

    def __init__(self, folder: Path, message: str):
        super().__init__(message)
        self.folder = folder


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
    """Return a checkpoint after verifying every file; raises TornVersion, naming the file, NotFiniteVersion among them.

    only: as `open_version` takes it; ENCODER for who reads the encoder alone.
    """
    manifest = open_version(folder, only)
    if not isinstance(manifest.get("step"), int):
        raise TornVersion(f"{folder} is no checkpoint: its manifest names no step")
    _refuse_broken(folder, [name for name in manifest["files"] if name.startswith(only)])
    return Checkpoint(folder, manifest["step"], manifest)


def is_finite(values: "Tensor") -> bool:
    """Tell whether a tensor holds neither NaN nor infinity, in one pass and without a copy."""
    return not values.numel() or all(math.isfinite(end.item()) for end in values.aminmax())  # NaN is both ends of what holds it


def _refuse_broken(folder: Path, names: list[str]) -> None:
    """Raise NotFiniteVersion, naming file and tensor. The price is one more pass over what was just read to be verified.

    Who reads the encoder alone finds NaN in the first embeddings, and names their text.
    """
    from safetensors import safe_open  # not for everyone who asks for a name

    for name in (name for name in names if name.startswith(STATE) and name.endswith(".safetensors")):
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                if not is_finite(file.get_tensor(key)):
                    raise NotFiniteVersion(folder, f"{key} in {folder / name} is not finite")


def newest_checkpoint(run: Path, on_torn=lambda _: None, only: str = "") -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None; on_torn is called with each TornVersion passed over.

    LATEST is tried first: after a roll-back it names an older step than the newest folder.
    """
    return _first_whole(run, [read_latest(checkpoints_folder(run))], on_torn, only)


def best_checkpoint(run: Path, on_torn=lambda _: None, only: str = "") -> Checkpoint | None:
    """Return the checkpoint that stands for a run, or None: the best one on dev if there is any, else the newest that verifies.

    Of a run that collapsed before there was a best one it is the last good one. on_torn: as in `newest_checkpoint`.
    """
    parent = checkpoints_folder(run)
    return _first_whole(run, [read_best(run), read_latest(parent)], on_torn, only)


def read_best(run: Path) -> str | None:
    """Return the name of the checkpoint that stands for a run before its newest, or None."""
    try:
        return (checkpoints_folder(run) / BEST).read_text().strip() or None
    except OSError:
        return None


def write_best(run: Path, step: int) -> None:
    """Let the checkpoint of a step stand for the run. Raises as `write_atomically`."""
    if read_best(run) != checkpoint_name(step):
        write_atomically(checkpoints_folder(run) / BEST, checkpoint_name(step) + "\n")


def _first_whole(run: Path, first: list[str | None], on_torn, only: str) -> Checkpoint | None:
    """Return the first checkpoint that verifies of those named, and then of all others, newest first."""
    newest_first = sorted(versions(checkpoints_folder(run)), reverse=True)
    for folder in sorted(newest_first, key=lambda f: first.index(f.name) if f.name in first else len(first)):
        try:
            return open_checkpoint(folder, only)
        except TornVersion as torn:
            on_torn(torn)
    return None


def steps_on_disk(run: Path) -> list[int]:
    """Return the steps of all published checkpoints, ascending, unverified."""
    return [int(folder.name.removeprefix("step-")) for folder in versions(checkpoints_folder(run))]
