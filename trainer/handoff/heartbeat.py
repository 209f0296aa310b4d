"""A heartbeat that goes on while one long call keeps this thread, such as training an index or tokenising a corpus."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from trainer.errors import InputError, MachineFailed

BEAT_S = 10.0  # between two beats: a sixth of the silence after which `negpool status` says so


@contextlib.contextmanager
def beating(beat: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call `beat` again and again from a thread of its own, until the block ends."""
    done = threading.Event()

    def keep_beating() -> None:
        while not done.wait(every_s):
            with contextlib.suppress(InputError, MachineFailed):  # a place that another took: for the block to find out
                beat()

    thread = threading.Thread(target=keep_beating, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
