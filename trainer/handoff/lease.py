"""Leases: which of several processes, on any machine, does a piece of work. The first takes it, and renews it while it works.

A lease ends when its holder lets go, when the holder is known to be dead, or when it was not renewed for LEASE_S by the clock
of the file server; within NAMED_S if it names no holder, who was killed between making the file and writing to it. A lease
only saves work: who loses one unawares does nothing wrong by finishing, for what comes of it is published whole, and the
first one stays. A lease is a file that names its holder. The next holder makes the next file, which only one process can, and
never replaces the last.
"""

import contextlib
import errno
import itertools
import json
import os
import secrets
import socket
import time
from pathlib import Path

import psutil

from trainer.handoff.clock import seconds_since_written
from trainer.handoff.manifest import disk_error, write_atomically

LEASE = ".lease-"
LEASE_S = 120.0  # longer than a batch takes, and compiling what encodes it; what a machine that died holds up its last pieces
NAMED_S = 5.0  # longer than it takes to write a line into a new file
ME = {"host": socket.gethostname(), "pid": os.getpid(), "start": secrets.token_hex(4)}  # a container's pids are all alike


class WorkFailed(Exception):
    """Whoever held the lease has found that the work cannot be done; the message says why."""


class Lease:
    """A piece of work that this process has taken."""

    def __init__(self, folder: Path, name: str, number: int):
        self._folder, self._name, self._number = folder, name, number
        self._renewed_at = time.monotonic()

    def renew(self) -> None:
        """Say that the work goes on; costs nothing if that was said just now."""
        if time.monotonic() - self._renewed_at > LEASE_S / 4:
            self._renewed_at = time.monotonic()
            with contextlib.suppress(OSError):  # it was lost, which does no harm
                os.utime(_file(self._folder, self._name, self._number))  # without a time of ours: the server stamps it

    def release(self) -> None:
        """Let go, the work done or left."""
        for number in range(self._number, -1, -1):
            with contextlib.suppress(OSError):
                _file(self._folder, self._name, number).unlink()

    def fail(self, reason: str) -> None:
        """Leave word for as long as the lease lasts that the work cannot be done: the others need not find out again."""
        with contextlib.suppress(Exception):  # they will find out again
            write_atomically(_file(self._folder, self._name, self._number), json.dumps({**_me(), "failed": reason}))


def take_lease(folder: Path, name: str) -> Lease | None:
    """Return the lease of a piece of work, or None while another process holds it.

    Raises WorkFailed if its holder has found that it cannot be done, InputError if the disk refuses.
    """
    for number in itertools.count():
        path = _file(folder, name, number)
        try:
            with _create(path) as file:
                file.write(json.dumps(_me()))
            return Lease(folder, name, number)
        except FileExistsError:
            age_s = seconds_since_written(path)
            if age_s is None:  # let go of just now
                return None
            holder = _read(path)
            is_held = age_s < (LEASE_S if holder else NAMED_S)
            if is_held and "failed" in holder:
                raise WorkFailed(holder["failed"]) from None
            if is_held and not _is_dead(holder):
                if not os.access(folder, os.W_OK):  # its holder cannot even let go
                    raise disk_error(OSError(errno.EROFS, os.strerror(errno.EROFS)), path) from None
                return None
        except OSError as error:
            with contextlib.suppress(OSError):  # a full disk took the name alone: nobody should wait for that
                path.unlink()
            raise disk_error(error, path) from error
    raise AssertionError


def _create(path: Path):
    try:
        return open(path, "x")
    except FileNotFoundError:  # the folder was deleted before this process had pinned it
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "x")


def _me() -> dict:
    return {**ME, "pid": os.getpid()}  # this process may have been forked since


def _is_dead(holder: dict) -> bool:
    """Tell whether a holder was a process of this machine that is no more.

    One that was killed stays in the list of processes until its parent asks for its end, which in a container may be never.
    """
    if holder.get("host") != ME["host"]:
        return False
    if holder["pid"] == os.getpid():
        return holder["start"] != ME["start"]
    try:
        return psutil.Process(holder["pid"]).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # it is there, and not ours to ask
        return False


def _read(path: Path) -> dict:
    """Return who holds a lease; nothing if its file is not written yet."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _file(folder: Path, name: str, number: int) -> Path:
    return folder / f"{LEASE}{name}.{number}"
