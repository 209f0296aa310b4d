"""Cores of its own for each rank of a machine, so that ranks do not move and do not share one."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from launch.counted import counted
from trainer.errors import InputError


def pin_to_own_cores(environment: Mapping[str, str], threads: int) -> list[int]:
    """Keep this process, with the threads that it has already, on cores that no other rank of the machine has; return them.

    Raises InputError where there are too few for the ranks' threads.
    """
    rank, num_ranks = int(environment.get("LOCAL_RANK", "0")), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    own = own_cores(sorted(os.sched_getaffinity(0)), rank, num_ranks, threads)
    for thread in Path("/proc/self/task").iterdir():  # libraries start some when they are imported
        with contextlib.suppress(OSError):
            os.sched_setaffinity(int(thread.name), own)
    return own


def own_cores(cores: list[int], rank: int, num_ranks: int, threads: int) -> list[int]:
    """Return a rank's cores: one for each of its threads, next to each other, however few the ranks are.

    A core more would take the threads that are not counted, such as that of the process group, and flatter the smaller sizes.
    """
    if len(cores) < num_ranks * threads:
        needed, fit = counted(num_ranks * threads, "core"), counted(len(cores) // threads, "rank")
        raise InputError(
            f"{counted(num_ranks, 'rank')} of {counted(threads, 'thread')} need {needed} of their own, and this machine gives "
            f"{len(cores)}; {fit} fit, or set --threads lower"
        )
    return cores[rank * threads : (rank + 1) * threads]
