"""A list of measurements against the clock: each has a time limit, and one that fails, hangs or dies does not end the rest.

Lines are measured one after another in one process beside this one, which starts anew behind a line that failed: what an error
leaves on a GPU would fail every line after it. Nothing heavy is imported here.
"""

import contextlib
import gc
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.output import keep_output_clean, start_logging

END_S = 5.0  # for a process to end
START_S = 60.0  # for a process to start, beside the limit of its first line


@dataclass(frozen=True)
class Row:
    """A figure, beside the wanted one."""

    what: str
    found: float | None
    unit: str
    wanted: float | None = None
    less_is_better: bool = False
    word: str = ""  # why there is no figure, or what it was measured with


@dataclass(frozen=True)
class Line:
    """A measurement: `measure(*arguments)` returns its rows. A module's function, for another process calls it."""

    what: str
    measure: Callable[..., list[Row]]
    limit_s: float  # it is ended behind that
    needs_s: float = 10.0  # it is not begun where less time is left


class LeftOut(Exception):
    """A line that cannot be measured here; its text is the word in the table."""


def measure_lines(
    lines: Sequence[Line], arguments: tuple[Any, ...], budget_s: float, on_line: Callable[[str, list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Return the rows of all lines within a time. on_line: called behind each with what it was about and all rows so far."""
    deadline, worker = time.monotonic() + budget_s, None
    rows: list[dict[str, Any]] = []
    try:
        for line in lines:
            left_s, started = deadline - time.monotonic(), time.monotonic()
            if left_s < line.needs_s:
                found, word, error = _nothing(f"no time left ({max(0.0, left_s):.0f} s)")
            else:
                worker = worker or _Worker(arguments)
                found, word, error = worker.ask(line, left_s)
                if word:
                    worker.end()
                    worker = None
            rows += [asdict(row) for row in found or [Row(line.what, None, "", word=word)]]
            rows[-1] |= {"error": error} if error else {}
            rows[-1]["line_s"] = round(time.monotonic() - started, 1)
            on_line(line.what, rows)
    finally:
        if worker is not None:
            worker.end()
    return rows


class _Worker:
    """The process that measures."""

    def __init__(self, arguments: tuple[Any, ...]):
        context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU that its parent has touched
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._grace_s, self._hangs = START_S, False

    def ask(self, line: Line, left_s: float) -> tuple[list[Row], str, str]:
        """Return the rows of a line, or none, a word, and the error in full."""
        limit_s, self._grace_s = min(line.limit_s + self._grace_s, left_s), 0.0
        try:
            self._pipe.send(line)
            if not self._pipe.poll(limit_s):
                self._hangs = True
                return _nothing(f"more than {limit_s:.0f} s")
            return self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            return _nothing(f"its process died ({self._process.exitcode})")

    def end(self) -> None:
        """End the process, which does so by itself unless it is at work."""
        self._pipe.close()
        self._process.join(0 if self._hangs else END_S)
        self._process.kill()
        self._process.join()


def _nothing(word: str, error: str = "") -> tuple[list[Row], str, str]:
    return [], word, error


def _serve(pipe: Any, arguments: tuple[Any, ...]) -> None:
    """Measure the lines that come through a pipe, until its other end is gone."""
    start_logging()
    keep_output_clean()
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(_measured(pipe.recv(), arguments))


def _measured(line: Line, arguments: tuple[Any, ...]) -> tuple[list[Row], str, str]:
    try:
        return line.measure(*arguments), "", ""
    except LeftOut as reason:
        return [Row(line.what, None, "", word=str(reason))], "", ""
    except Exception as error:
        word, name = " ".join(str(error).split())[:100], type(error).__name__
        return _nothing("out of memory" if name == "OutOfMemoryError" else f"{name}: {word}", traceback.format_exc())
    finally:
        gc.collect()
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
