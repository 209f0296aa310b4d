"""`on_threads(num_ranks, work)`: the ranks of a service as threads of this process, in a few milliseconds.

The service's own `Ranks` runs, over a communicator whose messages are copies, as MPI's are. Nobody asks such ranks to stop.
"""

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mining.ranks import Ranks

PATIENCE_S = 60.0  # for the other ranks; one that takes another path never comes


def on_threads(num_ranks: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Return what `work` returns on each rank; what it raises on one is raised here, and the others stop waiting for it."""
    world = World(num_ranks)
    with ThreadPoolExecutor(num_ranks) as pool:
        ranks = [Ranks(ThreadComm(world, rank), lambda: False) for rank in range(num_ranks)]
        done = [pool.submit(world.guard, work, each) for each in ranks]
    errors = [error for each in done if (error := each.exception()) is not None]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, SystemExit | Left))
    return [each.result() for each in done]


class Left(Exception):
    """Another rank has failed, and will never come."""


class World:
    """Where the ranks meet, each with a place for what it brings."""

    def __init__(self, num_ranks: int):
        self.size, self._slots = num_ranks, [b""] * num_ranks
        self._moved, self._num_here, self._turn, self._has_failed = threading.Condition(), 0, 0, False

    def guard(self, work: Callable[[Ranks], Any], ranks: Ranks) -> Any:
        """Return what `work` returns; nobody waits for a rank that fails."""
        try:
            return work(ranks)
        except BaseException:
            with self._moved:
                self._has_failed = True
                self._moved.notify_all()
            raise

    def wait(self) -> None:
        """Wait until all ranks are here. A barrier of the library would also stop those who met before one failed."""
        with self._moved:
            turn = self._turn
            self._num_here += 1
            if self._num_here == self.size:
                self._num_here, self._turn = 0, turn + 1
                self._moved.notify_all()
            self._moved.wait_for(lambda: self._turn != turn or self._has_failed, PATIENCE_S)
            if self._turn == turn:
                raise Left

    def swap(self, rank: int, value: Any) -> list[Any]:
        """Return copies of what all ranks brought, in their order."""
        self._slots[rank] = pickle.dumps(value)
        self.wait()
        found = [pickle.loads(slot) for slot in self._slots]
        self.wait()
        return found


class ThreadComm:
    """What `Ranks` asks of an MPI communicator; the names are MPI's."""

    def __init__(self, world: World, rank: int):
        self._world, self.rank, self.size = world, rank, world.size

    def Ibarrier(self) -> "ThreadComm":  # noqa: N802
        self._world.wait()
        return self

    def Test(self) -> bool:  # noqa: N802
        return True

    def iprobe(self, tag: int) -> bool:
        return False

    def bcast(self, value: Any) -> Any:
        return self._world.swap(self.rank, value)[0]

    def allgather(self, value: Any) -> list[Any]:
        return self._world.swap(self.rank, value)

    def gather(self, value: Any) -> list[Any] | None:
        found = self._world.swap(self.rank, value)
        return found if self.rank == 0 else None

    def alltoall(self, parts: list[Any]) -> list[Any]:
        assert len(parts) == self.size
        return [row[self.rank] for row in self._world.swap(self.rank, parts)]

    def Alltoallv(self, sent: list[Any], received: list[Any]) -> None:  # noqa: N802
        (buffer, counts), (into, expected) = sent, received
        assert sum(counts) == len(buffer) and sum(expected) == len(into)
        parts = self.alltoall(np.split(buffer, np.cumsum(counts)[:-1]))
        assert [len(part) for part in parts] == list(expected)
        into[:] = np.concatenate(parts)
