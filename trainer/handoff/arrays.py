"""Arrays on disk: mapped by any thread, or written by several processes at once, a `.npy` file in full size and rows at their
places in it.

Nobody holds more than the rows that it writes. Rows are disjoint and may be written again, so a write that failed is repeated.
"""

import errno
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.lib import format as npy

# NumPy reads the header of an array by Python's parser, which in Python 3.11 fails now and then when two threads are in it ("AST
# constructor recursion depth mismatch").
_parsing = threading.Lock()


def map_array(path: Path) -> np.ndarray:
    """Return the array of a `.npy` file, memory-mapped, in any thread; raises OSError or ValueError."""
    with _parsing:
        return np.load(path, mmap_mode="r", allow_pickle=False)


def create_array(path: Path, length: int, dtype: np.dtype) -> None:
    """Write the header of an array of one axis and take the room for its numbers, so that a full disk is known at once."""
    with open(path, "wb") as file:
        npy.write_array_header_1_0(file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)})
        file.flush()
        size = file.tell() + length * dtype.itemsize
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            file.truncate(size)  # a file system that reserves nothing


class ArrayWriter:
    """Writes rows into the arrays of a folder, as a block; its end syncs them."""

    def __init__(self, folder: Path, names: Iterable[str], is_shared: bool):
        """is_shared: other processes, perhaps on other machines, write other rows of the same files."""
        # An NFS client may write whole pages of a file, also the bytes of another machine's rows, as it read them before; it
        # does not where each write goes to the server at once.
        flags = os.O_WRONLY | (os.O_DSYNC if is_shared else 0)
        self._files: dict[str, tuple[int, int, np.dtype]] = {}  # handle, where the numbers begin, their type
        try:
            for name in names:
                with open(folder / f"{name}.npy", "rb") as file:
                    npy.read_magic(file)
                    with _parsing:
                        _, _, dtype = npy.read_array_header_1_0(file)
                    self._files[name] = os.open(file.name, flags), file.tell(), dtype
        except BaseException:
            self._close()
            raise

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Write rows of an array, from row `start` on."""
        handle, at, dtype = self._files[name]
        data, at = np.asarray(values, dtype).tobytes(), at + start * dtype.itemsize
        while data:
            written = os.pwrite(handle, data, at)
            data, at = data[written:], at + written

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                for handle, _, _ in self._files.values():
                    os.fsync(handle)
        finally:
            self._close()

    def _close(self) -> None:
        for handle, _, _ in self._files.values():
            os.close(handle)
