"""The ranks of the service: they sleep while they wait, one decides for all, and an error of one ends the work of all.

MPI's blocking collectives spin at full speed until the last rank arrives. Here all ranks first meet with a test and a
sleep, and the collective that follows is over at once: on a machine shared with the trainer that is worth a core.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from trainer.errors import EXIT_STOPPED, TOLD, MachineFailed, NotFiniteEmbedding, exit_code
from trainer.handoff.manifest import TornVersion, disk_error, is_disk_error

if TYPE_CHECKING:  # importing MPI starts it, and readers of a job have no use for that
    from mpi4py import MPI

    from mining.alone import Alone

log = logging.getLogger(__name__)

T = TypeVar("T")

NAP_S, LONGEST_NAP_S = 0.0005, 0.05  # between two looks at whether all ranks have come
NAP_SHARE = 0.02  # of the time waited already; so the rank that comes last waits only that much longer for the others to wake
STOP_PATIENCE_S = 60.0  # for the others to come, after a request to stop: a rank that died never does
FAREWELL_S = 30.0  # for MPI's own end, once all ranks have come to it
TAG_STOP, TAG_CALL_OFF = 75, 76
ROUND_BYTES = 1 << 28  # that a rank sends at once, to all others together


class Stopped(Exception):
    """A rank was asked to stop; every rank leaves with this."""


class Refused(Exception):
    """No version can come of these weights; the message says why."""


class Superseded(Exception):
    """A newer checkpoint came before half of the work on this one was done."""


CAUSES = (Refused, NotFiniteEmbedding, TornVersion, Superseded, MachineFailed)  # to give up a version, and not the service


class GivenUp(Exception):
    """Every rank gives up the version at work, for one of CAUSES; the service goes on."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


class Ranks:
    """The processes of one service. All methods but `stop_asked` and `check_stop` are collective."""

    def __init__(self, comm: "MPI.Comm | Alone", is_interrupted: Callable[[], bool]):
        """is_interrupted: whether this process was asked to stop; one rank's yes stops all."""
        self._comm: Any = comm  # the messages between ranks are never sent where one is alone
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
        """Raise Stopped if any rank was asked to stop, Superseded if rank 0 has called off; only in `together` and `decide`."""
        if self.stop_asked():
            raise Stopped
        if self._comm.iprobe(tag=TAG_CALL_OFF):
            raise Superseded

    def call_off(self) -> None:
        """Have every rank leave the work at hand. Rank 0 only, inside `together`; raises Superseded."""
        for other in range(1, self.num_ranks):
            self._comm.isend(None, dest=other, tag=TAG_CALL_OFF)
        raise Superseded

    def meet(self) -> None:
        """Wait, asleep, until every rank is here."""
        request, began, asked_at = self._comm.Ibarrier(), time.monotonic(), None
        while not request.Test():
            if self.stop_asked():  # passes the word on while waiting
                asked_at = asked_at or time.monotonic()
                if time.monotonic() - asked_at > STOP_PATIENCE_S:
                    log.warning("asked to stop; another rank has not answered for %.0f s, leaving without it", STOP_PATIENCE_S)
                    os._exit(EXIT_STOPPED)  # MPI's own farewell would wait for it, too
            self.on_wait()
            time.sleep(min(max(NAP_S, NAP_SHARE * (time.monotonic() - began)), LONGEST_NAP_S))

    def decide(self, choose: Callable[[], T]) -> T:
        """Return on every rank what `choose` returns on rank 0; what it raises is raised by all, as by `together`."""
        own, error = _attempt(choose) if self.speaks else (None, None)
        self.meet()
        told, error = self._comm.bcast((own, error))
        self._raise_alike([error])
        return own if self.speaks else told  # type: ignore[return-value] # what is told is a copy, on rank 0, too

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Return what `work` returns on rank 0, None elsewhere; what it raises is raised by all."""
        return self.together(lambda: work() if self.speaks else None)

    def together(self, work: Callable[[], T]) -> T:
        """Return what `work` returns on this rank; if it raises one of TOLD or CAUSES, or Stopped, on any rank, all leave.

        One of CAUSES becomes GivenUp, the same on every rank; what a disk refuses becomes what `disk_error` makes of it.
        """
        value, error = _attempt(work)
        self.meet()
        self._raise_alike(self._comm.allgather(error))
        return value  # type: ignore[return-value]

    def share_all(self, work: Callable[[], T]) -> list[T]:
        """Return what `work` returns on every rank, in order of rank, on every rank; what it raises is raised as by `together`.

        For small values: they travel as one message.
        """
        value = self.together(work)
        return self.exchange([value] * self.num_ranks)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value on rank 0, an empty list elsewhere."""
        self.meet()
        return self._comm.gather(value) or []

    def exchange(self, parts: list[T]) -> list[T]:
        """Return what every rank has for this one; parts: one for each rank, in order of rank."""
        self.meet()
        return self._comm.alltoall(parts)

    def exchange_arrays(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        """Return what every rank has for this one, as `exchange` does, for arrays of any size.

        parts: one for each rank, alike but for the length of their first axis. Their bytes travel as they are, in rounds of
        ROUND_BYTES: Open MPI counts bytes with 32 bits.
        """
        if self.num_ranks == 1:
            return parts
        flat = [np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts]
        told = self.exchange([(part.shape, part.nbytes) for part in parts])
        like, received = parts[self.rank].dtype, [np.empty(size, np.uint8) for _, size in told]
        most = max(self.exchange([max(len(part) for part in flat)] * self.num_ranks))
        step = max(1, ROUND_BYTES // self.num_ranks)
        for start in range(0, most, step):
            piece = slice(start, start + step)
            out, into = ([each[piece] for each in side] for side in (flat, received))
            counts = [[len(each) for each in side] for side in (out, into)]
            joined, landed = np.concatenate(out), np.empty(sum(counts[1]), np.uint8)
            self.meet()
            self._comm.Alltoallv([joined, counts[0]], [landed, counts[1]])
            for each, found in zip(into, np.split(landed, np.cumsum(counts[1])[:-1]), strict=True):
                each[:] = found
        return [found.view(like).reshape(shape) for found, (shape, _) in zip(received, told, strict=True)]

    def local_rank(self) -> int:
        """Return this rank's place among those of its machine."""
        if self.num_ranks == 1:
            return 0
        from mpi4py import MPI

        self.meet()
        machine = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        place = machine.rank
        machine.Free()
        return place

    def leave(self) -> None:
        """Take leave of the others, who leave too: no message stays behind."""
        self.meet()
        for tag in (TAG_STOP, TAG_CALL_OFF):
            while self._comm.iprobe(tag=tag):
                self._comm.recv(tag=tag)

    def abort(self, code: int) -> None:
        """End every rank at once, for an error that the others do not know of. Alone: return."""
        if self.num_ranks > 1:
            self._comm.Abort(code)

    def _raise_alike(self, errors: list[Any]) -> None:
        if any(isinstance(error, Superseded) for error in errors):
            self._take_back()
        causes = [error for error in errors if isinstance(error, CAUSES)]
        refusals = [(rank, e) for rank, e in enumerate(errors) if isinstance(e, TOLD) and e not in causes]
        if refusals:
            self.has_agreed_on_error = True
            if refusals[0][0] == self.rank:
                raise refusals[0][1]
            raise SystemExit(exit_code(refusals[0][1]))  # one sentence is enough: the rank it came from says it
        if any(isinstance(error, Stopped) for error in errors):
            raise Stopped
        if causes:
            raise GivenUp(causes[0])

    def _take_back(self) -> None:
        """Receive the message that the work was called off, after every rank has seen it."""
        if not self.speaks:
            self._comm.recv(source=0, tag=TAG_CALL_OFF)


def leave_mpi(code: int) -> None:
    """End MPI, and with it the process, with `code`, if that takes longer than FAREWELL_S. Collective over MPI's world.

    By then all work is done and reported. Without this, a library that hangs while it ends, as Open MPI does in about one of a
    thousand runs (open-mpi/ompi#10117), would occupy a node until its time limit.
    """
    from mpi4py import MPI

    Ranks(MPI.COMM_WORLD, lambda: False).meet()  # whoever still writes is waited for
    sys.stdout.flush()
    watchdog = threading.Timer(FAREWELL_S, os._exit, [code])
    watchdog.daemon = True
    watchdog.start()
    MPI.Finalize()
    watchdog.cancel()


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except (*TOLD, Stopped, *CAUSES) as error:
        return None, error
    except Exception as error:
        if not is_disk_error(error):
            raise
        return None, disk_error(error, getattr(error, "filename", None) or "a file of the run")
