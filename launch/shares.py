"""Who gets which of this machine's cores and GPUs, when trainer and miner share it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval
from pydantic import NonNegativeInt, PositiveInt

from launch.counted import counted
from trainer.ranges import job_section


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
    max_restarts: NonNegativeInt = 3
    """How often each side is started again after it died by itself."""


@dataclass(frozen=True)
class Shares:
    """The shares of both sides."""

    train_ranks: int
    mine_ranks: int  # 0: the trainer is alone
    threads: int  # of each process
    train_gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them
    mine_gpus: tuple[str, ...] = ()
    train_share: float = 1.0  # of the memory of its GPU, of a process; 1: nobody else is on it
    mine_share: float = 1.0

    def __str__(self) -> str:
        sides = (("trainer", self.train_ranks, self.train_gpus), ("miner", self.mine_ranks, self.mine_gpus))
        shares = (
            f"{counted(ranks, name + ' rank')}{' on GPU ' if gpus else ''}{','.join(gpus)}"
            for name, ranks, gpus in sides
            if ranks
        )
        of_rank = f"{self.train_share:.0%} of its memory for a trainer rank, {self.mine_share:.0%} for a miner rank"
        shared = f"; the miner shares the trainer's GPU, {of_rank}" if self.train_share < 1 else ""
        return f"{', '.join(shares)}, {counted(self.threads, 'thread')} each{shared}"


def share_out(settings: LaunchSettings, cores: int, gpus: tuple[str, ...], mines: bool = True) -> Shares:
    """Return the shares of both sides; without mines all is the trainer's.

    cores: that processes may use; gpus: names of those that can be seen, none: all work is done on cores.
    """
    mine_ranks = settings.mine_ranks if mines else 0
    own = mine_ranks if len(gpus) > mine_ranks else 0  # GPUs that the miner has for itself
    train_gpus = gpus[: len(gpus) - own]
    train_ranks = len(train_gpus) or settings.train_ranks
    # No more threads than cores: OpenMP's threads wait for each other, so that two too many cost more than half the speed.
    threads = max(1, cores // (train_ranks + mine_ranks))
    mine_gpus = gpus[-own:] if own else gpus if mine_ranks else ()
    train_share, mine_share = memory_shares(settings.train_memory_share, train_gpus, mine_gpus, mine_ranks)
    return Shares(train_ranks, mine_ranks, threads, train_gpus, mine_gpus, train_share, mine_share)


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
