"""A small disk of its own, and a full one."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """Mount a disk of so many bytes ("900k") at a new folder; skip the test where that needs more rights."""
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path, free_kib: int = 0) -> Path:
    """Write a file that leaves no more than so much room on a disk, and return it."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    with open(ballast, "r+b") as file:
        file.truncate(max(0, ballast.stat().st_size - 1024 * free_kib))
    return ballast
