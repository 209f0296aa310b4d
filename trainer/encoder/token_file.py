"""Token ids of many texts in one Arrow file, read row by row through a map of it."""

import mmap
from pathlib import Path

import numpy as np
import pyarrow as pa

ROWS_OF_BATCH = 20_000  # of the file: few enough batches to open, small enough to write


def write_token_file(ids: pa.Table, path: Path) -> None:
    """Write a table of one column, a list of tokens for each row."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, ids.schema) as writer:
        for start in range(0, len(ids), ROWS_OF_BATCH):
            writer.write_table(ids.slice(start, ROWS_OF_BATCH).combine_chunks())


class TokenFile:
    """Token ids in an Arrow file, memory-mapped, in batches of ROWS_OF_BATCH rows."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._words = np.frombuffer(self._map, np.int32, len(self._map) // 4)  # the whole file; Arrow aligns what it holds
        first = self._words.ctypes.data
        columns = [batch.column(0) for batch in pa.ipc.open_stream(pa.py_buffer(self._map))]
        # Of each batch the word in which its tokens begin, and where each row begins among them.
        self._batches = [((column.values.to_numpy().ctypes.data - first) // 4, column.offsets.to_numpy()) for column in columns]
        self._let_go()

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the tokens of some rows one after the other, int32.

        Large reads are numpy's alone, which lets other threads of Python run meanwhile.
        """
        number, row = np.divmod(rows, ROWS_OF_BATCH)
        order = np.argsort(number, kind="stable")
        start, length = np.empty((2, len(rows)), np.int64)
        for part in np.split(order, np.flatnonzero(np.diff(number[order])) + 1):
            if len(part):
                word, offsets = self._batches[number[part[0]]]
                start[part] = word + offsets[row[part]].astype(np.int64)
                length[part] = offsets[row[part] + 1] - offsets[row[part]]
        end = np.cumsum(length)
        place = np.repeat(start - end + length, length)
        place += np.arange(len(place))
        found = self._words.take(place)
        self._let_go()
        return found

    def _let_go(self) -> None:
        # A random read maps some 64 KiB around it, so a shuffled epoch would make the whole file resident. It stays in
        # the system's page cache, shared by all ranks of a machine.
        self._map.madvise(mmap.MADV_DONTNEED)
