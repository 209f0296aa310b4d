"""How far mining is, for the person who waits: the phase, what of it is done, and how long the rest takes."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from launch.output import SAY_EVERY_S, redraws
from launch.phases import clock
from trainer.errors import ENDED
from trainer.handoff.heartbeat import beating
from trainer.metrics import read_status

LOOK_EVERY_S = 0.5
SELDOM = 0.05  # of the time so far, between two lines of a log: hours make no thousand lines
MEASURE_S = 3.0  # of a phase, before its rate says anything
UNITS = {"encod": "texts", "search": "queries"}  # what a phase counts, by how its name begins


@contextlib.contextmanager
def followed(run: Path, console: Console) -> Iterator[None]:
    """Tell what the service says in its status file: one live line in a terminal, else a line now and then for each phase."""
    started, said, said_at, pace = time.monotonic(), "", 0.0, Pace()

    def follow() -> None:
        nonlocal said, said_at
        status, now = read_status(run, "miner"), time.monotonic()
        phase, done, total = status.get("phase", "starting"), status.get("done") or 0, status.get("total") or 0
        line = f"{clock(now - started)}  {progress_line(phase, done, total, pace.left_s(phase, done, total, now))}"
        if redraws(console):
            show.update(line)
        elif phase not in ENDED and (phase != said or now - said_at > max(SAY_EVERY_S, SELDOM * (now - started))):
            said, said_at = phase, now
            console.print(line, markup=False)

    with console.status("starting") as show, beating(follow, LOOK_EVERY_S):
        yield


class Pace:
    """The rate of a phase since it was first seen at work: what was on disk before is no work of now."""

    def __init__(self) -> None:
        self._phase, self._since, self._done_before = "", 0.0, 0

    def left_s(self, phase: str, done: int, total: int, now: float) -> float | None:
        """Return how many seconds a phase takes from now on; None where that is not known yet. now: of any clock, in seconds."""
        if phase != self._phase or done < self._done_before:
            self._phase, self._since, self._done_before = phase if total else "", now, done
        advanced, seconds = done - self._done_before, now - self._since
        return (total - done) * seconds / advanced if advanced and seconds >= MEASURE_S else None


def progress_line(phase: str, done: int, total: int, left_s: float | None) -> str:
    """Return the words for how far a phase is."""
    unit = next((f" {unit}" for start, unit in UNITS.items() if phase.startswith(start)), "")
    amount = f"  {done:,} of {total:,}{unit}" if total else ""
    return f"{phase}{amount}" + (f", about {clock(left_s)} left" if left_s is not None and done < total else "")
