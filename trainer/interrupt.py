"""SIGTERM, SIGINT and SIGUSR1 ask a process to save and leave; a second SIGINT ends it at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

ASKS_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupt:
    """Remembers that the process was asked to stop."""

    def __init__(self) -> None:
        # Without a lock, so no threading.Event: a signal that comes while the handler of the one before it is at work would
        # wait for ever for the lock which that one holds. Clusters send signals twice, by Slurm and by the launcher.
        self._was_asked = False
        on_signals(ASKS_TO_STOP, self._receive)

    def is_set(self) -> bool:
        """Tell whether the process was asked to stop."""
        return self._was_asked

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._was_asked and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self._was_asked = True


def on_signals(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]) -> None:
    """Set a handler; in any but the main thread, where Python allows none, signals stay as they are."""
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            signal.signal(number, handler)


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Give a process that goes on afterwards its own handlers of signals back."""
    before = {number: signal.getsignal(number) for number in ASKS_TO_STOP}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
