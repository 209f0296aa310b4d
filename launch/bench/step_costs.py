"""What each phase of a cached step takes of one rank: seconds and peak memory, of this rank's own work.

A phase that begins within another one is not counted to it. What stands for other ranks is a phase by itself, "others", and no
part of the step. Phases are the step's spans; on a GPU each waits for the device at both ends.
"""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gradcache.spans import noted_by
from launch.bench.machine import peak_bytes, restart_peak, start_peak
from launch.step_phases import OF_SPANS, REST

OTHERS, MASKS = "others", "masks"


class StepCosts:
    """Seconds and peaks by phase, of one step or several."""

    def __init__(self, device: torch.device, trims: bool = False):
        """trims: give back between phases what the C library keeps of freed memory; it takes time that is none of a phase."""
        self._device, self._trims, self._at = device, trims, 0.0
        self._running: list[str] = []
        self._reset()

    def _reset(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, int] = defaultdict(int)  # bytes that this process held, at most

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside to a phase."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as a phase."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def of_step(self) -> Iterator[None]:
        """Count the phases of what happens inside, from nothing."""
        self._reset()
        with noted_by(self):
            yield

    def noting(self, name: str, collective: str | None, num_bytes: int) -> contextlib.AbstractContextManager[None]:
        """Count a span to its phase; masks are one here, because they grow with the ranks as nothing else does."""
        return self.phase(MASKS if name == MASKS else OF_SPANS.get(name, REST))

    def _switch(self) -> None:
        """Count what has passed since the last switch to the phase that was running."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now, peak = time.perf_counter(), peak_bytes(self._device)
        if self._running:
            name = self._running[-1]
            self.seconds[name] += now - self._at
            self.peaks[name] = max(self.peaks[name], peak)
        (start_peak if self._trims else restart_peak)(self._device)
        self._at = time.perf_counter()
