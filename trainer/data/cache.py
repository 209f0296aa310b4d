"""Where Arrow tables and token ids are kept, and how several processes build one without tearing it."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from trainer.errors import InputError
from trainer.handoff.manifest import disk_error, write_atomically

RECENT_S = 2.0  # the coarsest clock of a file system still in use


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


def file_digest(path: Path, cache: Path) -> str:
    """Return the SHA-256 of a file, remembered under its path, size and time of change.

    As `make` and `git` do. What was written in the last seconds is read again the next time, too: a second change may
    leave the same time.
    """
    try:
        about = path.stat()
        known = json.dumps([str(path.resolve()), about.st_size, about.st_mtime_ns, about.st_ino])
        memo = cache / "digests" / hashlib.sha256(known.encode()).hexdigest()[:24]
        if memo.is_file() and len(kept := memo.read_text()) == 64:
            return kept
        with open(path, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); a data set needs it") from error
    if time.time() - about.st_mtime > RECENT_S:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memo, digest)
    return digest
