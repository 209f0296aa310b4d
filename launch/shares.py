"""Who gets which of this machine's cores and GPUs, when trainer and miner share it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval
from pydantic import NonNegativeInt, PositiveInt

from launch.counted import counted
from trainer.errors import InputError
from trainer.ranges import job_section

TOPOLOGY = Path("/sys/devices/system/cpu")


@job_section
class LaunchSettings:
    """Section `launch`: processes of `negpool run`, and of a node without GPUs."""

    train_ranks: PositiveInt = 2
    """Trainer processes; with GPUs one for each that the miner leaves."""
    mine_ranks: PositiveInt = 1
    """MPI ranks of the miner, and its GPUs; where there are no more it shares the trainer's."""
    train_memory_share: Annotated[float, Interval(gt=0, lt=1)] = 0.7
    """Of the memory of a GPU that both sides share: the trainer's; the rest is the miner's. Alone on a GPU, a side has all of it.
    """
    mine_cores: PositiveInt | None = None
    """Cores of this machine that only the miner uses, and the trainer the others; None: both sides use all."""
    mine_niceness: Annotated[int, Interval(ge=0, le=19)] = 0
    """Of the miner's processes, as nice(1) has it: the higher, the less of a core they get that the trainer wants, too."""
    max_restarts: NonNegativeInt = 3
    """How often each side is started again after it died by itself."""


@dataclass(frozen=True)
class Shares:
    """The shares of both sides."""

    train_ranks: int
    mine_ranks: int  # 0: the trainer is alone
    threads: int  # of each process; where the miner has cores of its own, of a trainer rank
    train_gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them
    mine_gpus: tuple[str, ...] = ()
    train_share: float = 1.0  # of the memory of its GPU, of a process; 1: nobody else is on it
    mine_share: float = 1.0
    mine_cores: int = 0  # that only the miner uses, and the trainer the others; 0: both use all
    mine_threads: int | None = None  # of a miner rank, where the miner has cores of its own
    mine_niceness: int = 0

    def __str__(self) -> str:
        sides = (("trainer", self.train_ranks, self.train_gpus), ("miner", self.mine_ranks, self.mine_gpus))
        shares = (
            f"{counted(ranks, name + ' rank')}{' on GPU ' if gpus else ''}{','.join(gpus)}"
            for name, ranks, gpus in sides
            if ranks
        )
        of_rank = f"{self.train_share:.0%} of its memory for a trainer rank, {self.mine_share:.0%} for a miner rank"
        shared = f"; the miner shares the trainer's GPU, {of_rank}" if self.train_share < 1 else ""
        threads = f"{counted(self.threads, 'thread')} each"
        if self.mine_cores:
            threads = (
                f"{counted(self.threads, 'thread')} a trainer rank, {counted(self.mine_threads or 1, 'thread')} a miner rank"
            )
            threads += f" on {counted(self.mine_cores, 'core')} of its own"
        nice = f"; the miner's niceness is {self.mine_niceness}" if self.mine_niceness and self.mine_ranks else ""
        return f"{', '.join(shares)}, {threads}{shared}{nice}"


def share_out(settings: LaunchSettings, cores: int, gpus: tuple[str, ...], mines: bool = True) -> Shares:
    """Return the shares of both sides; without mines all is the trainer's.

    cores: that processes may use; gpus: names of those that can be seen, none: all work is done on cores.
    Raises InputError for a miner that would leave the trainer no core.
    """
    mine_ranks = settings.mine_ranks if mines else 0
    mine_cores = settings.mine_cores if mines and settings.mine_cores else 0
    if mine_cores >= cores:
        raise InputError(
            f"launch.mine_cores={mine_cores} leaves the trainer none of {counted(cores, 'core')}; "
            + (f"set it to {cores - 1} at most" if cores > 1 else "leave it out")
        )
    own = mine_ranks if len(gpus) > mine_ranks else 0  # GPUs that the miner has for itself
    train_gpus = gpus[: len(gpus) - own]
    train_ranks = len(train_gpus) or settings.train_ranks
    # No more threads than cores: OpenMP's threads wait for each other, so that two too many cost more than half the speed.
    threads = max(1, (cores - mine_cores) // (train_ranks + (0 if mine_cores else mine_ranks)))
    mine_threads = max(1, mine_cores // mine_ranks) if mine_cores else None
    mine_gpus = gpus[-own:] if own else gpus if mine_ranks else ()
    train_share, mine_share = memory_shares(settings.train_memory_share, train_gpus, mine_gpus, mine_ranks)
    return Shares(
        train_ranks,
        mine_ranks,
        threads,
        train_gpus,
        mine_gpus,
        train_share,
        mine_share,
        mine_cores,
        mine_threads,
        settings.mine_niceness,
    )


def memory_shares(
    train_share: float, train_gpus: tuple[str, ...], mine_gpus: tuple[str, ...], mine_ranks: int
) -> tuple[float, float]:
    """Return which share of a GPU's memory a trainer rank and a miner rank have; each trainer rank has a GPU of its own."""
    if not set(train_gpus) & set(mine_gpus):
        return 1.0, 1.0
    return train_share, round((1 - train_share) / -(-mine_ranks // len(mine_gpus)), 4)


def cores_and_gpus(environment: Mapping[str, str]) -> tuple[int, tuple[str, ...]]:
    """Return what this process may use."""
    import torch

    names = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return len(os.sched_getaffinity(0)), tuple(names[:count]) if names else tuple(str(number) for number in range(count))


def cores_in_order() -> list[int]:
    """Return the cores that this process may use; those that are threads of one physical core stand side by side."""

    def place(core: int) -> tuple[int, ...]:
        return *(_topology(core, name) for name in ("physical_package_id", "core_id")), core

    return sorted(os.sched_getaffinity(0), key=place)


def _topology(core: int, name: str) -> int:
    try:
        return int((TOPOLOGY / f"cpu{core}" / "topology" / name).read_text())
    except (OSError, ValueError):  # a system that does not tell
        return 0
