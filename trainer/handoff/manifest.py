"""Versions that other processes may read: staged beside, hashed, renamed into place once.

A version is a folder with a `manifest.json`, written last, that names every file with its size and digest (see digests.py).
Readers open only what a manifest names and verify it first, so a version is whole or absent, whoever is killed and when.
Each file is hashed once by its writers, when all of it is written and before it is synced, and once by each process that opens
the version, before it reads a number of it.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import InputError, MachineFailed
from trainer.handoff.clock import seconds_since_written
from trainer.handoff.digests import Digest, describe_file, what_differs
from trainer.handoff.rights import give_rights, unreadable

MANIFEST = "manifest.json"
LATEST = "LATEST"
PINS = ".pins"
STAGING = ".staging-"
DELETED = "-deleted"  # how the name of a folder ends that is being deleted
IS_THERE = (errno.ENOTEMPTY, errno.EEXIST)  # what a rename says where a folder with files is
SHORT_WRITE = re.compile(r"^\d+ requested and \d+ written$")  # numpy's words for a disk that took half an array
# A place where this process may not write, or where there is no such place: a person has to change something.
NO_RIGHT = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_NAME = (errno.ELOOP, errno.ENAMETOOLONG)
NO_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, *NO_NAME)
# A disk or a file server that fails; it may be well again in a minute.
BROKEN = (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENOLCK, errno.EUCLEAN)


class TornVersion(Exception):
    """A version is absent, incomplete or altered; the message names the file."""


class NotReadable(TornVersion):
    """A version is there, and this process may not read it; the message names who may change that."""


def publish_version(
    folder: Path,
    write: Callable[[Path], None],
    fields: dict[str, Any],
    may_publish: Callable[[], None] = lambda: None,
    digest: Digest = "sha256",
) -> dict[str, Any]:
    """Write a version into `folder` so that it appears whole or not at all, and return its manifest.

    What is there already and whole stays, and its manifest is returned: of several that publish one version at once the first
    wins. A torn one is replaced.

    write: called with an empty staging folder; fills it.
    fields: JSON values kept in the manifest beside the list of files; `write` may add some.
    may_publish: called last, before the version appears; raises if this process may not write any more.
    digest: of the files; "xxh3_128" for what only negpool reads.
    Raises InputError for a folder that cannot be written, MachineFailed for a disk that is full or fails; nothing half-written
    stays behind.
    """
    try:
        staging = stage(folder)
        write(staging)
        files = {str(p.relative_to(staging)): describe_file(p, digest) for p in sorted(staging.rglob("*")) if p.is_file()}
        return seal(staging, folder, {**fields, "files": files}, may_publish)
    except Exception as error:
        shutil.rmtree(staging_place(folder), ignore_errors=True)
        if isinstance(error, OSError) or is_disk_full(error):
            raise disk_error(error, folder) from error
        raise


def stage(folder: Path) -> Path:
    """Return an empty folder beside a version's place, which `seal` renames into it. Raises OSError."""
    staging = staging_place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    return staging


def seal(staging: Path, folder: Path, manifest: dict[str, Any], may_publish: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Rename what is staged into its place with its manifest, which has "files", and return the manifest that is there then.

    May be called again after it has failed. may_publish: as `publish_version` has it. Raises OSError.
    """
    if not staging.is_dir():  # a call before this one has renamed it, and failed afterwards
        return open_version(folder)
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
    give_rights(staging)
    for path in [*staging.rglob("*"), staging]:
        _fsync(path)
    may_publish()
    if (whole := _rename_unless_there(staging, folder)) is not None:
        shutil.rmtree(staging)
        return whole
    _fsync(folder.parent)
    return manifest


def remove_torn(folder: Path) -> bool:
    """Delete what is in a version's place unless it is whole; return whether it was deleted.

    Several may do so at once, while others publish anew: what is moved aside is looked at again, and put back if it is whole.
    """
    aside = staging_place(folder).with_name(f"{staging_place(folder).name}-torn")
    try:
        torn = folder.stat().st_ino
        try:
            open_version(folder)
            return False
        except NotReadable as error:  # whole, perhaps, for whoever may read it
            raise InputError(str(error)) from error
        except TornVersion:
            pass
        shutil.rmtree(aside, ignore_errors=True)
        if folder.stat().st_ino != torn:  # replaced while this one read
            return False
        os.rename(folder, aside)
    except FileNotFoundError:  # another one has deleted it
        return False
    with contextlib.suppress(TornVersion):
        open_version(aside)  # it was replaced between the look and the rename
        with contextlib.suppress(OSError):  # or has come a third time, which is as good
            os.rename(aside, folder)
            return False
    shutil.rmtree(aside, ignore_errors=True)
    return True


def clean_staging(parent: Path) -> None:
    """Delete what killed writers left below a folder; only for the one process that may write there."""
    for leftover in parent.glob(f"{STAGING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    """Tell whether a disk or quota was full; libraries that are not Python's own only say so in words."""
    is_said = "No space left on device" in str(error) or SHORT_WRITE.search(str(error)) is not None
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or is_said


def is_disk_error(error: BaseException) -> bool:
    """Tell whether a disk, its quota, its server or its rights refused something, or an exception made of that."""
    if isinstance(error, InputError | MachineFailed):
        return error.__cause__ is not None and is_disk_error(error.__cause__)
    return is_disk_full(error) or (isinstance(error, OSError) and error.errno in (*NO_RIGHT, *NO_NAME, *BROKEN))


def disk_error(error: BaseException, path: Path | str) -> InputError | MachineFailed:
    """Return the sentence for what the disk refused: InputError where a person has to name another place, else MachineFailed."""
    if is_disk_full(error):
        return MachineFailed(f"no room left on the disk for {path}; free some space or set run.folder to another disk")
    reason = getattr(error, "strerror", None) or error
    if getattr(error, "errno", None) in (*NO_RIGHT, *NO_PLACE):
        return InputError(f"cannot write {path}: {reason}; run.folder must be a folder you may write to")
    return MachineFailed(f"the disk or file server of {path} failed: {reason}; when it is well again, the same command goes on")


def open_version(folder: Path, only: str = "") -> dict[str, Any]:
    """Return the manifest of a version after verifying the size and digest of every file it names.

    only: verify the files whose names begin so, for a reader who opens no others.
    Raises TornVersion, naming the file, if the manifest or any file is missing or altered.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        if not name.startswith(only):
            continue
        try:
            difference = what_differs(folder / name, expected)
        except OSError as error:
            raise _not_opened(folder / name, f"{folder / name} is missing") from error
        if difference is not None:
            raise TornVersion(f"{folder / name} is not what its manifest says: {difference}")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a version without verifying its files; raises TornVersion if there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _not_opened(folder / MANIFEST, f"{folder} has no readable {MANIFEST}") from error
    return manifest


def versions(parent: Path) -> list[Path]:
    """Return the versions below a folder in the order of their names: complete ones, unverified, and those not to be read."""
    if not parent.is_dir():
        return []
    found = (p for p in parent.iterdir() if not p.name.startswith("."))
    return sorted(p for p in found if unreadable(p / MANIFEST) or (p / MANIFEST).is_file())


def write_latest(parent: Path, name: str) -> None:
    """Point `parent/LATEST` at a version, by one rename."""
    write_atomically(parent / LATEST, name + "\n")


def read_latest(parent: Path) -> str | None:
    """Return the name that `parent/LATEST` holds, or None."""
    try:
        return (parent / LATEST).read_text().strip() or None
    except OSError:
        return None


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file by one rename; raises what `disk_error` makes of a disk that refuses."""
    # Two writers of one file, perhaps on two machines, each write beside it.
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a disk that takes no file lets none be deleted
            beside.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def pin(folder: Path, holder: str, seconds: float) -> None:
    """Keep retention away from a version for some seconds; pinning again extends it. Raises as `write_atomically`."""
    write_atomically(folder.parent / PINS / f"{folder.name}.{holder}", str(seconds))


def unpin(folder: Path, holder: str) -> None:
    """Let go of a version; where the disk refuses that, the pin ends by itself."""
    with contextlib.suppress(OSError):
        (folder.parent / PINS / f"{folder.name}.{holder}").unlink(missing_ok=True)


def is_pinned(folder: Path) -> bool:
    """Tell whether anyone holds an unexpired pin on a version; two machines' clocks may differ."""
    for lease in (folder.parent / PINS).glob(f"{folder.name}.*"):
        with contextlib.suppress(OSError, ValueError):
            age_s = seconds_since_written(lease)
            if age_s is not None and age_s < float(lease.read_text()):
                return True
    return False


def _not_opened(path: Path, reason: str) -> TornVersion:
    """Return why a version's file was not opened: that this process may not, or another reason."""
    told = unreadable(path)
    return TornVersion(reason) if told is None else NotReadable(told)


def _rename_unless_there(staging: Path, folder: Path) -> dict[str, Any] | None:
    """Rename a staged version into its place, or return the manifest of a whole one that is there."""
    while True:
        try:
            os.rename(staging, folder)
            return None
        except OSError as error:
            if error.errno not in IS_THERE:
                raise
        with contextlib.suppress(TornVersion):
            return open_version(folder)  # versions never change: the first one stays
        remove_torn(folder)


def staging_place(folder: Path) -> Path:
    """Return where this process stages a version, or moves it aside."""
    # Two processes may encode the same shard: each stages its own.
    return folder.parent / f"{STAGING}{folder.name}-{socket.gethostname()}-{os.getpid()}"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
