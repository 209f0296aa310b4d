"""What a loop hands over and does not wait for: one thread does it, in order.

Files that are synced, renamed or on a server, and trackers, each take milliseconds or, on a bad day, minutes. The price is that a
failure is known a moment later: it is raised by the next call.
"""

import concurrent.futures
from collections.abc import Callable
from typing import Any


class Writer:
    """A thread that does one call after the other. Python itself waits at its end for those that nobody has waited for."""

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "writer")
        self._last: concurrent.futures.Future[None] | None = None
        self._failure: BaseException | None = None

    def check(self) -> None:
        """Raise what a call has failed with, each time anew."""
        if self._failure is not None:
            raise self._failure

    def put(self, call: Callable[..., None], *arguments: Any) -> None:
        """Have `call(*arguments)` done behind the ones before. From any thread. Raises as `check`, and does nothing then."""
        self.check()
        self._last = self._pool.submit(self._do, call, *arguments)

    def wait(self) -> None:
        """Return when all that was put is done. Raises as `check`."""
        if self._last is not None:
            self._last.result()
        self.check()

    def close(self) -> None:
        """Return when all that was put is done, and end the thread. Raises as `check`."""
        self._pool.shutdown()
        self.check()

    def _do(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._failure is not None:
            return
        try:
            call(*arguments)
        except BaseException as error:
            self._failure = error
