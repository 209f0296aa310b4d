"""Where Arrow tables and token ids are kept, and how several processes build one without tearing it."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from trainer.handoff.manifest import disk_error


def cache_folder(cache: Path | None) -> Path:
    """Return the folder for what can be computed again; None: `negpool` in the user's cache folder."""
    if cache is not None:
        return cache
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "negpool"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, made by `build(staging)` unless it is there; other processes wait for the one that builds.

    Raises InputError when the disk is full; nothing half-written stays.
    """
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():
                staging = folder.with_name(f".{folder.name}.staging")
                shutil.rmtree(staging, ignore_errors=True)  # what a killed process left
                staging.mkdir()
                try:
                    build(staging)
                    os.rename(staging, folder)
                finally:
                    with contextlib.suppress(OSError):
                        shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise disk_error(error, folder) from error
    return folder
