"""One clock for all machines of a run: the one that stamps files in its folder. Their own clocks may be hours apart."""

import os
import tempfile
import time
from pathlib import Path


def server_time(folder: Path) -> float:
    """Return the present time, in seconds, as the file server of a folder stamps it.

    Where nothing can be written, this machine's own clock is the best there is.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def seconds_since_written(path: Path) -> float | None:
    """Return how long ago a file was written, by the clock that stamped it; None if it is not there."""
    try:
        with open(path, "rb") as file:  # opening asks the server, where a look at the name may be answered from a cache
            written = os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    return server_time(path.parent) - written
