"""Ctrl-C, from the first import to the last line: one sentence, no traceback, code 75.

While modules are imported nothing has to be cleaned up, and an exception would come out in pieces of their machinery, so the
process leaves at once; so it does when Ctrl-C is pressed again. At other times KeyboardInterrupt unwinds what is at work. Sides
and supervisors put their own handlers in this one's place, as soon as they have something to save.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from trainer.errors import EXIT_STOPPED

SENTENCE = "negpool: stopped by Ctrl-C\n"
SHOW_CURSOR = "\x1b[?25h"  # which a live line of progress has hidden


@contextlib.contextmanager
def ctrl_c_in_one_line() -> Iterator[None]:
    """End the process by one sentence when Ctrl-C is pressed in this block; after it nothing disturbs the end of Python."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as behind nohup, it stays so
        yield
        return
    signal.signal(signal.SIGINT, _Leave())
    try:
        yield
    except KeyboardInterrupt:
        _say()
        sys.exit(EXIT_STOPPED)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Leave:
    """The handler; forked workers have it, too."""

    def __init__(self) -> None:
        self._process, self._was_asked = os.getpid(), False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        is_worker = os.getpid() != self._process
        if not (is_worker or self._was_asked or _is_importing(frame)):
            self._was_asked = True
            raise KeyboardInterrupt
        if not is_worker:
            _say()
        os._exit(EXIT_STOPPED)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _say() -> None:
    if os.environ.get("RANK", "0") == "0":  # of several ranks one is enough
        os.write(2, ((SHOW_CURSOR if os.isatty(2) else "") + SENTENCE).encode())
