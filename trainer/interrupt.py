"""SIGTERM, SIGINT and SIGUSR1 ask a process to save and leave; a second SIGINT ends it at once."""

import signal


class Interrupt:
    """Remembers that the process was asked to stop. Made in the main thread."""

    def __init__(self) -> None:
        # Without a lock, so no threading.Event: a signal that comes while the handler of the one before it is at work would
        # wait for ever for the lock which that one holds. Clusters send signals twice, by Slurm and by the launcher.
        self._was_asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def is_set(self) -> bool:
        """Tell whether the process was asked to stop."""
        return self._was_asked

    def _receive(self, number, frame) -> None:
        if self._was_asked and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self._was_asked = True
