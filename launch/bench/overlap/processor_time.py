"""The processor time that each side of a run takes, as the system counts it for their processes."""

import contextlib
import time

import numpy as np
import psutil

SIDES = ("trainer", "miner")


class ProcessorTime:
    """Looks at the sides of a supervisor, which are its children, and at all that these have started."""

    def __init__(self) -> None:
        self._looked_at: list[float] = []
        self._seconds: list[dict[str, float]] = []  # by side, of all its processes so far
        self._of_process: dict[tuple[int, float], tuple[str, float]] = {}  # those that are gone, too

    def look(self, supervisor: int) -> None:
        """Note what both sides have taken by now. supervisor: its process id."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(supervisor).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    side = "miner" if "mine" in child.cmdline() else "trainer"
                    for process in (child, *child.children(recursive=True)):
                        self._note(side, process)
        taken = dict.fromkeys(SIDES, 0.0)
        for side, seconds in self._of_process.values():
            taken[side] += seconds
        self._looked_at.append(time.time())
        self._seconds.append(taken)

    def _note(self, side: str, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            self._of_process[process.pid, process.create_time()] = side, times.user + times.system

    def taken(self, begin: float, end: float) -> dict[str, float]:
        """Return the seconds that each side took between two times of day."""
        found = {}
        for side in SIDES:
            before, after = np.interp([begin, end], self._looked_at, [seconds[side] for seconds in self._seconds])
            found[side] = float(after - before)
        return found
