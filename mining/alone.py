"""The world of a miner that is one process by itself, without MPI.

Importing MPI starts it, and a start that fails ends the process: a command's may be lost so, a person's notebook may not.
"""

from typing import Any


class Alone:
    """What `Ranks` asks of an MPI communicator, where nobody else is."""

    rank, size = 0, 1

    def Ibarrier(self) -> "Alone":  # noqa: N802 - the names are MPI's
        """Return the request of a barrier, which `Test` finds done."""
        return self

    def Test(self) -> bool:  # noqa: N802
        return True

    def iprobe(self, tag: int) -> bool:
        """Tell whether a message waits."""
        return False

    def bcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    allgather = gather

    def alltoall(self, parts: list[Any]) -> list[Any]:
        return parts
