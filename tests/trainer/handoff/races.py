"""Two processes that publish the same versions in lockstep."""

import contextlib
import os
from pathlib import Path

import torch.distributed as dist

from trainer.handoff.manifest import TornVersion, open_version, publish_version, remove_torn


def write(folder: Path) -> None:
    (folder / "a.bin").write_bytes(os.urandom(8))


def publish_in_lockstep(rank: int, root: Path, num_versions: int) -> int:
    """Publish versions at the same moment as the others; return how many of them this rank wrote."""
    won = 0
    for number in range(num_versions):
        dist.barrier()
        manifest = publish_version(root / f"v{number}", write, {"by": rank})
        assert open_version(root / f"v{number}") == manifest
        won += manifest["by"] == rank
    return won


def replace_torn_in_lockstep(rank: int, root: Path, num_versions: int) -> int:
    """Find the same versions torn, and replace them, as the others do; return for how many a whole one was missing after."""
    num_lost = 0
    for number in range(num_versions):
        folder = root / f"t{number}"
        if rank == 0:
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text('{"files": {"a.bin": {}}}')
        dist.barrier()
        remove_torn(folder)
        publish_version(folder, write, {})
        dist.barrier()
        with contextlib.suppress(TornVersion):
            open_version(folder)
            continue
        num_lost += 1
    return num_lost
