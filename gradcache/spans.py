"""Named stretches of a step: for torch's profiler, and for a recorder that adds up what each of them takes.

Where nobody looks, a span is one shared object that does nothing. A recorder notes the host's clock, or on a GPU events that the
device passes when it has done what was queued before; so nothing waits until the spans of a step are read.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

_NOTHING = contextlib.nullcontext()
_here = threading.local()  # .noter: of this thread; ranks may be threads of one process


@dataclass(frozen=True, kw_only=True)
class TimedSpan:
    """A stretch of time on one rank."""

    name: str
    begin_s: float  # since the first span that was read with it
    end_s: float
    self_s: float  # without the spans inside
    collective: str | None  # what all ranks called together in it, if that is all it holds
    num_bytes: int  # of the collective's whole buffer, see `gradcache/traffic.py`

    @property
    def duration_s(self) -> float:
        """All of it."""
        return self.end_s - self.begin_s


def span(name: str, collective: str | None = None, whole: Tensor | None = None) -> AbstractContextManager[object]:
    """Return a context whose stretch is known by a name, in traces of torch's profiler, too.

    collective, whole: of a span that is one collective, its kind and the buffer whose bytes count.
    """
    noter: Noter | None = getattr(_here, "noter", None)
    if noter is not None:
        return noter.noting(name, collective, 0 if whole is None else whole.nbytes)
    return _marked(name)


def _marked(name: str) -> AbstractContextManager[object]:
    """Return a mark for torch's profiler, where it looks: making one takes some microseconds."""
    return record_function(name) if torch.autograd._profiler_enabled() else _NOTHING


class Instant:
    """A moment of a device's work; a GPU passes it when it has done all that is queued."""

    def __init__(self, device: torch.device):
        self.device = device
        self._host_s, self._event = time.perf_counter(), None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def since(self, earlier: "Instant") -> float:
        """Return the seconds between two moments; waits for a GPU to pass the later one."""
        if self._event is None or earlier._event is None:
            return self._host_s - earlier._host_s
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


class Recorder:
    """The spans of this thread, in the order in which they begin."""

    def __init__(self, device: torch.device):
        self.device = device
        self._noted: list[_Noted] = []
        self._beside: list[_Noted] = []
        self._open: list[int] = []

    @contextlib.contextmanager
    def noting(self, name: str, collective: str | None, num_bytes: int) -> Iterator[None]:
        """Note a span."""
        noted = _Noted(name, collective, num_bytes, self._open[-1] if self._open else None, Instant(self.device))
        self._open.append(len(self._noted))
        self._noted.append(noted)
        try:
            with _marked(name):
                yield
        finally:
            noted.finish()
            self._open.pop()

    def begin_beside(self, name: str, collective: str, num_bytes: int) -> "_Noted":
        """Begin a collective that runs beside the others' spans, in whatever thread; its `finish` ends it."""
        noted = _Noted(name, collective, num_bytes, None, Instant(self.device))
        self._beside.append(noted)
        return noted

    def read(self) -> list[TimedSpan]:
        """Return the spans since the last call, those beside others last, and forget them. Waits for a GPU.

        Called outside of all spans.
        """
        noted, self._noted, self._beside = self._noted + self._beside, [], []
        if not noted:
            return []
        first = noted[0].begin
        times = [(each.begin.since(first), each.last.since(first)) for each in noted]
        self_s = [end - begin for begin, end in times]
        for each, (begin, end) in zip(noted, times, strict=True):
            if each.parent is not None:
                self_s[each.parent] -= end - begin
        return [
            TimedSpan(name=n.name, begin_s=t[0], end_s=t[1], self_s=s, collective=n.collective, num_bytes=n.num_bytes)
            for n, t, s in zip(noted, times, self_s, strict=True)
        ]


@dataclass(eq=False)
class _Noted:
    name: str
    collective: str | None
    num_bytes: int
    parent: int | None
    begin: Instant
    end: Instant | None = None

    def finish(self) -> None:
        self.end = Instant(self.begin.device)

    @property
    def last(self) -> Instant:
        assert self.end is not None, "spans are read outside of all of them"
        return self.end


@contextlib.contextmanager
def recording(device: torch.device) -> Iterator[Recorder]:
    """Record the spans of this thread during the block."""
    recorder = Recorder(device)
    with noted_by(recorder):
        yield recorder


class Noter(Protocol):
    """Who is told of spans, as a `Recorder` is."""

    def noting(self, name: str, collective: str | None, num_bytes: int) -> AbstractContextManager[object]:
        """Return what a span is, from its beginning to its end; `span` says what is what."""


@contextlib.contextmanager
def noted_by(noter: Noter) -> Iterator[None]:
    """Tell of the spans of this thread during the block."""
    before = getattr(_here, "noter", None)
    _here.noter = noter
    try:
        yield
    finally:
        _here.noter = before
