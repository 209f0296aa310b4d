"""SIGTERM, SIGINT and SIGUSR1 ask a process to save and leave; a second SIGINT ends it at once."""

import signal
import threading


class Interrupt:
    """Remembers that the process was asked to stop. Made in the main thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def is_set(self) -> bool:
        """Tell whether the process was asked to stop."""
        return self._event.is_set()

    def _receive(self, number, frame) -> None:
        if self._event.is_set() and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self._event.set()
