"""What a disk refuses is tried again, for so long, and then it is the machine's failure, whatever it said."""

import errno
import os

import pytest

from trainer.errors import InputError, MachineFailed, RunInUse
from trainer.handoff import retry
from trainer.handoff.manifest import disk_error
from trainer.handoff.retry import patiently


class FailingWrite:
    """Raises so many times, then returns how often it was called."""

    def __init__(self, error: Exception, times: int):
        self.error, self.times, self.calls = error, times, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.calls


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def sentence(number: int) -> Exception:
    """What publish_version makes of an error."""
    try:
        raise disk_error(os_error(number), "runs/x") from os_error(number)
    except (InputError, MachineFailed) as error:
        return error


@pytest.fixture(autouse=True)
def waited(monkeypatch):
    """The seconds of all waits."""
    found: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", found.append)
    return found


REFUSALS = [os_error(errno.ESTALE), os_error(errno.EACCES), sentence(errno.EIO), sentence(errno.EROFS)]
REFUSALS += [sentence(errno.ENOSPC), RuntimeError("I/O error: No space left on device (os error 28)")]


@pytest.mark.parametrize("error", REFUSALS, ids=str)
def test_a_write_that_fails_for_a_while_succeeds(error, waited):
    assert patiently(FailingWrite(error, 3), "runs/x") == 4 and waited == [1, 2, 4]


@pytest.mark.parametrize("error", REFUSALS, ids=str)
def test_one_that_fails_for_a_minute_is_the_machines_failure(error, waited):
    with pytest.raises(MachineFailed, match="runs/x"):
        patiently(FailingWrite(error, 99), "runs/x")
    assert sum(waited) == 60


@pytest.mark.parametrize("error", [RunInUse("another trainer"), InputError("no such model"), ValueError("a bug")], ids=str)
def test_what_no_disk_says_is_raised_at_once(error, waited):
    with pytest.raises(type(error), match=str(error)):
        patiently(FailingWrite(error, 1), "runs/x")
    assert waited == []


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EACCES, InputError, "cannot write runs/x: Permission denied; run.folder must be a folder you may write to"),
        (errno.EROFS, InputError, "cannot write runs/x: Read-only file system"),
        (errno.ENOTDIR, InputError, "cannot write runs/x: Not a directory"),
        (errno.ENOSPC, MachineFailed, "no room left on the disk for runs/x; free some space"),
        (errno.EDQUOT, MachineFailed, "no room left on the disk for runs/x; free some space"),
        (errno.ESTALE, MachineFailed, "the disk or file server of runs/x failed: Stale file handle; when it is well again"),
        (errno.EIO, MachineFailed, "the disk or file server of runs/x failed: Input/output error"),
    ],
)
def test_rights_are_the_users_and_a_disk_that_is_full_or_fails_is_the_machines(number, kind, words):
    error = disk_error(os_error(number), "runs/x")
    assert type(error) is kind and str(error).startswith(words)
