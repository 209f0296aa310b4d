"""Pins of one process on the folders that it reads: nothing that is pinned is deleted (see `delete_unpinned`)."""

import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

from trainer.handoff.heartbeat import beating
from trainer.handoff.manifest import pin, unpin

PIN_S = 600.0  # how long a pin outlives a process that was killed


class Pins:
    """Holds folders from `hold` until they are let go. As a block, a thread renews the pins, and its end lets go."""

    def __init__(self) -> None:
        self._held: set[Path] = set()
        self._renewed_at = time.monotonic()
        self._changing = threading.RLock()  # a pin that was let go of must not be renewed in the same moment
        self._holder = f"{socket.gethostname()}-{os.getpid()}-{id(self)}"

    def hold(self, folder: Path) -> None:
        """Keep whoever deletes away from a folder, which need not be there yet. Raises InputError."""
        with self._changing:
            pin(folder, self._holder, PIN_S)
            self._held.add(folder)

    def let_go(self) -> None:
        """Let go of all folders."""
        with self._changing:
            while self._held:
                unpin(self._held.pop(), self._holder)

    def renew(self) -> None:
        """Hold all folders anew; to be called often, which costs nothing, or left to the block's thread."""
        with self._changing:
            if time.monotonic() - self._renewed_at < PIN_S / 4:
                return
            self._renewed_at = time.monotonic()
            for folder in self._held:
                pin(folder, self._holder, PIN_S)

    def __enter__(self) -> "Pins":
        self._beating = beating(self.renew, PIN_S / 8)
        self._beating.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._beating.__exit__(kind, error, trace)
        self.let_go()
