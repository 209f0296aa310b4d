"""Where Arrow tables and token ids are kept, and how several processes build one without tearing it."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from trainer.errors import InputError
from trainer.handoff.clock import server_time
from trainer.handoff.manifest import (
    STAGING,
    TornVersion,
    disk_error,
    is_disk_error,
    publish_version,
    read_manifest,
    write_atomically,
)

log = logging.getLogger(__name__)

RECENT_S = 2.0  # the coarsest clock of a file system still in use
STALE_S = 3600.0  # without a write; a builder writes all the time, but for hashing: half a terabyte at 150 MB/s

_watching: list[list["Table"]] = []  # who wants to know of every table


def cache_folder(cache: Path | None) -> Path:
    """Return the folder for what can be computed again; None: `negpool` in the user's cache folder."""
    if cache is not None:
        return cache
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "negpool"


def build_once(folder: Path, what: str, build: Callable[[Path], None]) -> Path:
    """Return `folder`, made by `build(staging)` unless it is there whole; other processes wait for the one that builds.

    The lock only saves work: each process builds a copy of its own, hashes it and publishes it with a manifest, and a whole
    copy that is there already stays. So where nodes do not see each other's locks a table may be made twice, but is never
    torn. Opening compares the sizes of all files with the manifest, and not the hashes, because hashing a hundred gigabytes at
    each start of each rank would take minutes. `negpool data prepare --verify` compares the hashes, too.
    what: the table for people, as "tokens of the corpus". Raises InputError when the disk is full.
    """
    made = False
    if not is_whole(folder):
        with _alone(folder.with_name(f".{folder.name}.lock")):
            if not is_whole(folder):
                clear_stale(folder.parent)
                publish_version(folder, build, {"what": what})
                made = True
    for tables in _watching:
        tables.append(Table(folder, what, made))
    return folder


@dataclass(frozen=True)
class Table:
    """A table that was asked for."""

    folder: Path
    what: str
    made: bool  # by this process; False: it was there, or another one has made it meanwhile

    @property
    def num_bytes(self) -> int:
        return sum(file["bytes"] for file in read_manifest(self.folder)["files"].values())


@contextlib.contextmanager
def tables_asked_for() -> Iterator[list[Table]]:
    """Yield a list that takes up every table that is asked for inside."""
    tables: list[Table] = []
    _watching.append(tables)
    try:
        yield tables
    finally:
        _watching.remove(tables)


def is_whole(folder: Path) -> bool:
    """Tell whether a table is there with every file in the size that its manifest says."""
    try:
        files = read_manifest(folder)["files"].items()
        return all((folder / name).stat().st_size == expected["bytes"] for name, expected in files)
    except (TornVersion, OSError):
        return False


def clear_stale(cache: Path) -> None:
    """Delete what killed processes have staged in a cache: where nothing has been written for STALE_S."""
    for staging in cache.glob(f"{STAGING}*"):
        with contextlib.suppress(OSError):  # another one clears, too, or its builder has published it
            written = max(path.stat().st_mtime for path in (staging, *staging.rglob("*")))
            if server_time(cache) - written > STALE_S:
                shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock during the block; where the file system has no locks, go on without one."""
    held = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except (OSError, NotImplementedError) as error:
        if is_disk_error(error) and getattr(error, "errno", None) != errno.ENOLCK:
            raise disk_error(error, lock.parent) from error
        log.warning("%s cannot be locked (%s); several processes may make the same table", lock.parent, error)
    try:
        yield
    finally:
        held.release()


def file_digest(path: Path, cache: Path) -> str:
    """Return the SHA-256 of a file, remembered under its path, size and time of change.

    `make` and `git` recognise unchanged files in the same way. A file that changed in the last seconds is read again the next
    time, because a second change within that time would leave the time of change as it is.
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
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, memo.parent) from error
        write_atomically(memo, digest)
    return digest
