"""What is wrong with a data set, with file and place: problems that a person must mend, and blemishes.

One set of rules for two readers: `open_dataset` stops at the first problem and counts blemishes, `check_dataset` collects all.
"""

import bz2
import codecs
import difflib
import gzip
import io
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from trainer.errors import InputError


def _open_zstd(path: Path) -> io.BufferedReader:
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


PACKED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
UNPACKING = (EOFError, zlib.error, lzma.LZMAError)  # what reading damaged ones raises, beside an OSError without number


class Problem(NamedTuple):
    """Something in a data set that a person must mend, or may; number 0: the file as a whole."""

    file: Path
    number: int  # of the line; of the row in a file without lines, counted from 1
    kind: str  # problems of one kind are counted together
    sentence: str
    is_blemish: bool = False  # what is named is left out or read otherwise, and the rest is right

    def __str__(self) -> str:
        if not self.number:
            return f"{self.file}: {self.sentence}"
        return f"{place_of(self.file, self.number)}: {self.sentence}"


Report = Callable[[Problem], None]


class Blemishes(NamedTuple):
    """All blemishes of one kind in a data set."""

    kind: str
    times: int
    first: str  # as it is told, with its place


def has_rows(file: Path) -> bool:
    """Return whether places in a file are rows, not lines."""
    return file.suffix in (".parquet", ".arrow") or (".json" in file.suffixes and first_byte(file) == b"[")


def open_plain(path: Path) -> IO[bytes]:
    """Open a file that may be compressed, by gzip, bzip2, xz or zstd."""
    return PACKED[path.suffix](path) if path.suffix in PACKED else open(path, "rb")


def first_byte(path: Path) -> bytes:
    """Return the first byte of a file that is no space and no mark of its encoding; nothing if it cannot be read."""
    try:
        with open_plain(path) as file:
            return file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    except (OSError, *UNPACKING):
        return b""


def place_of(file: Path, number: int) -> str:
    """Return a place as an editor opens it, or as a row of a file without lines."""
    return f"{file}, row {number}" if has_rows(file) else f"{file}:{number}"


class Refusal:
    """A report that raises the first problem as an InputError, and counts blemishes."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # by kind

    def __call__(self, problem: Problem) -> None:
        if not problem.is_blemish:
            raise InputError(str(problem))
        self._counts[problem.kind] += 1
        if problem.kind not in self._first:
            self._first[problem.kind] = str(problem)

    def blemishes(self) -> list[Blemishes]:
        """Return what was counted, by kind, in the order of their first ones."""
        return [Blemishes(kind, count, self._first[kind]) for kind, count in self._counts.items()]


def near_names(missing: str, found: Iterable[str]) -> str:
    """Return a clause on the name that was perhaps meant, or an empty text."""
    close = difflib.get_close_matches(missing, list(found), n=1, cutoff=0.6)
    return f"; did you mean it by {close[0]!r}?" if close else ""
