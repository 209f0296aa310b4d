"""Files and folders that a person asked for: written beside their place, synced, and renamed into it once.

So they are whole or absent, whoever is killed and when, and nothing that was there is overwritten.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import InputError
from trainer.handoff.manifest import is_disk_full


def refuse_full(out: Path, argument: str = "--out") -> None:
    """Raise InputError if a new folder would hide something. argument: what the command line calls it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; give {argument} a new folder, or delete that one")


@contextlib.contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """Yield where to write the file or folder that becomes `out`, whole or not at all; raises InputError if the disk refuses."""
    out = out.absolute()
    beside = out.with_name(f".{os.getpid()}.{out.name}")  # whoever writes goes by how the name ends
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        for path in [*beside.rglob("*"), beside]:
            _sync(path)
        os.rename(beside, out)
        _sync(out.parent)
    except Exception as error:
        if not isinstance(error, OSError) and not is_disk_full(error):
            raise
        reason = "no room is left on the disk" if is_disk_full(error) else getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {out}: {reason}; choose another place for it") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(beside) if beside.is_dir() else beside.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
