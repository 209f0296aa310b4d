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
        columns = [batch.column(0) for batch in pa.ipc.open_stream(pa.py_buffer(self._map))]
        self._batches = [(column.values.to_numpy(), column.offsets.to_numpy()) for column in columns]
        self._let_go()

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the tokens of some rows one after the other, int32."""
        parts = [np.empty(0, np.int32)]
        for number, row in zip(*(part.tolist() for part in np.divmod(rows, ROWS_OF_BATCH)), strict=True):
            values, offsets = self._batches[number]
            parts.append(values[offsets[row] : offsets[row + 1]])
        found = np.concatenate(parts)
        self._let_go()
        return found

    def _let_go(self) -> None:
        # A random read maps some 64 KiB around it, so a shuffled epoch would make the whole file resident. It stays in
        # the system's page cache, shared by all ranks of a machine.
        self._map.madvise(mmap.MADV_DONTNEED)
