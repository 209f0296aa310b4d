"""Ranks as threads of one process: what one needs to try a loss on several ranks within a test, without starting processes.

`ThreadGroup` has of a process group what the loss uses. It is for small tensors on a CPU: every message is a copy under a lock.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

PATIENCE_S = 60  # for the slowest rank
Result = TypeVar("Result")


class ThreadGroup:
    """A process group whose ranks are threads, as one of them sees it."""

    def __init__(self, rank: int, slots: list, barrier: threading.Barrier):
        """slots: of what each rank sends, shared by all; so is the barrier."""
        self._rank, self._slots, self._barrier = rank, slots, barrier

    def rank(self) -> int:
        """Return the number of this rank."""
        return self._rank

    def size(self) -> int:
        """Return the number of ranks."""
        return len(self._slots)

    def allreduce(self, tensors: list[Tensor], options: object = None) -> None:
        """Sum a tensor over the ranks, in place."""
        (mine,) = tensors
        mine.copy_(self._meet(mine, lambda every: torch.stack(every).sum(0)))

    def all_gather_single(self, received: Tensor, mine: Tensor, options: object = None) -> None:
        """Put the tensors of all ranks one behind the other."""
        received.copy_(self._meet(mine, torch.cat))

    def reduce_scatter_single(self, received: Tensor, mine: Tensor, options: object = None) -> None:
        """Sum over the ranks what each has for this one."""
        received.copy_(self._meet(mine, lambda every: sum(sent.chunk(len(every))[self._rank] for sent in every)))

    def all_to_all_single(self, received: Tensor, mine: Tensor, sizes: list[int], sent: list[int], options=None) -> None:
        """Receive from each rank what it has for this one."""
        every = self._meet((mine, sent), lambda every: [parts.split(counts)[self._rank].clone() for parts, counts in every])
        received.copy_(torch.cat(every))

    # As torch before 2.13 names them.
    _allgather_base, _reduce_scatter_base, alltoall_base = all_gather_single, reduce_scatter_single, all_to_all_single

    def _meet(self, mine, take: Callable):
        """Return what `take` makes of the tensors of all ranks; none goes on before all have taken theirs."""
        self._slots[self._rank] = mine
        self._barrier.wait(PATIENCE_S)
        taken = take(list(self._slots))
        self._barrier.wait(PATIENCE_S)
        return taken


def run_threads(fn: Callable[[ThreadGroup], Result], num_ranks: int) -> list[Result]:
    """Return what the function returns on each rank. Raises the error of the rank that failed first."""
    slots: list = [None] * num_ranks
    barrier = threading.Barrier(num_ranks)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = fn(ThreadGroup(rank, slots, barrier))
        except BaseException as error:
            errors.append(error)  # before the others notice
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(num_ranks)]
