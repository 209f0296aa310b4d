"""The ranks of the service: waits that sleep, decisions of one for all, errors that leave nobody behind.

MPI's blocking collectives spin at full speed until the last rank arrives. Here all ranks first meet with a test and a
sleep, and the collective that follows is over at once: on a machine shared with the trainer that is worth a core.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.errors import InputError

if TYPE_CHECKING:  # importing MPI starts it, and readers of a job have no use for that
    from mpi4py import MPI

T = TypeVar("T")

NAP_S, LONGEST_NAP_S = 0.0005, 0.05  # between two looks at whether all ranks have come; doubles up to the longest
TAG_STOP = 75


class Stopped(Exception):
    """A rank was asked to stop; every rank leaves with this."""


class Ranks:
    """The processes of one service. All methods but `stop_asked` and `check_stop` are collective."""

    def __init__(self, comm: "MPI.Comm", is_interrupted: Callable[[], bool]):
        """is_interrupted: whether this process was asked to stop; one rank's yes stops all."""
        self._comm = comm
        self.on_wait: Callable[[], None] = lambda: None  # called every now and then while waiting for the others
        self._is_interrupted = is_interrupted
        self._has_told = False
        self.rank, self.num_ranks = comm.rank, comm.size
        self.has_agreed_on_error = False  # every rank is leaving with the same error

    @property
    def speaks(self) -> bool:
        """Whether this rank decides, writes shared files and tells people."""
        return self.rank == 0

    def stop_asked(self) -> bool:
        """Tell whether any rank is known to have been asked to stop, and tell the others."""
        if self._is_interrupted() and not self._has_told:
            self._has_told = True
            for other in set(range(self.num_ranks)) - {self.rank}:
                self._comm.isend(None, dest=other, tag=TAG_STOP)
        # The message is left where it is: it answers this question as long as the service lives.
        return self._has_told or self._comm.iprobe(tag=TAG_STOP)

    def check_stop(self) -> None:
        """Raise Stopped if any rank was asked to stop; only inside `together` and `decide`."""
        if self.stop_asked():
            raise Stopped

    def meet(self) -> None:
        """Wait, asleep, until every rank is here."""
        request, nap_s = self._comm.Ibarrier(), NAP_S
        while not request.Test():
            self.stop_asked()  # passes the word on while waiting
            self.on_wait()
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, LONGEST_NAP_S)

    def decide(self, choose: Callable[[], T]) -> T:
        """Return on every rank what `choose` returns on rank 0; what it raises is raised by all."""
        value, error = _attempt(choose) if self.speaks else (None, None)
        self.meet()
        value, error = self._comm.bcast((value, error))
        self._raise_alike([error])
        return value  # type: ignore[return-value]

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Return what `work` returns on rank 0, None elsewhere; what it raises is raised by all."""
        return self.together(lambda: work() if self.speaks else None)

    def together(self, work: Callable[[], T]) -> T:
        """Return what `work` returns on this rank; if it raises InputError or Stopped on any rank, all leave."""
        value, error = _attempt(work)
        self.meet()
        self._raise_alike(self._comm.allgather(error))
        return value  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value on rank 0, an empty list elsewhere."""
        self.meet()
        return self._comm.gather(value) or []

    def exchange(self, parts: list[T]) -> list[T]:
        """Return what every rank has for this one; parts: one for each rank, in order of rank."""
        self.meet()
        return self._comm.alltoall(parts)

    def local_rank(self) -> int:
        """Return this rank's place among those of its machine."""
        from mpi4py import MPI

        self.meet()
        machine = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        place = machine.rank
        machine.Free()
        return place

    def leave(self) -> None:
        """Take leave of the others, who leave too: no message stays behind."""
        self.meet()
        while self._comm.iprobe(tag=TAG_STOP):
            self._comm.recv(tag=TAG_STOP)

    def abort(self, code: int) -> None:
        """End every rank at once, for an error that the others do not know of. Alone: return."""
        if self.num_ranks > 1:
            self._comm.Abort(code)

    def _raise_alike(self, errors: list[Any]) -> None:
        refusals = [(rank, error) for rank, error in enumerate(errors) if isinstance(error, InputError)]
        if refusals:
            self.has_agreed_on_error = True
            if refusals[0][0] == self.rank:
                raise refusals[0][1]
            raise SystemExit(2)  # one sentence is enough: the rank it came from says it
        if any(isinstance(error, Stopped) for error in errors):
            raise Stopped


def _attempt(work: Callable[[], Any]) -> tuple[Any, InputError | Stopped | None]:
    try:
        return work(), None
    except (InputError, Stopped) as error:
        return None, error
