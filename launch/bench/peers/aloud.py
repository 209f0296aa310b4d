"""What ranks that were started for a benchmark say while they work: lines in a file, which the starting process repeats."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from launch.output import messages

EVERY_S = 1.0


def say_to(file: Path, sentence: str) -> None:
    """Append a line, for whoever repeats it."""
    with open(file, "a") as said:
        said.write(sentence + "\n")


@contextlib.contextmanager
def repeated(file: Path) -> Iterator[None]:
    """Print every line that is appended to a file during the block."""
    done = threading.Event()
    repeater = threading.Thread(target=_repeat, args=(file, done), daemon=True)
    repeater.start()
    try:
        yield
    finally:
        done.set()
        repeater.join()


def _repeat(file: Path, done: threading.Event) -> None:
    file.touch()
    with open(file) as said:
        is_last = False
        while not is_last:
            is_last = done.wait(EVERY_S)  # what was said before it is read below
            for line in said:
                messages().print(line.rstrip("\n"), style="dim", markup=False)
