"""The rows of a tile, a block at a time, and the masked cells of a block."""

from collections.abc import Iterator

from torch import Tensor

from gradcache.masks import Masks

# b rows of a block, P columns

BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}  # scores of one block: 4 MiB stay in a core's share of the cache
BLOCK_CELLS = 4 * 2**20  # masked cells of one block, which stand in a list of 16 bytes each


class Blocks:
    """How rows are cut into blocks, by what the cache of a core holds and by the number of masked cells."""

    def __init__(self, masks: Masks, row_bytes: int, device_type: str):
        """row_bytes: of the scores of one row."""
        self._masks = masks
        self._most_rows = max(1, BLOCK_BYTES.get(device_type, BLOCK_BYTES["cuda"]) // row_bytes)

    def of(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        """Yield (the rows of a block, where they stand in the tile of these rows)."""
        start = rows.start
        while start < rows.stop:
            stop = min(start + self._most_rows, rows.stop)
            while stop - start > 1 and self._masks.num_cells(slice(start, stop)) > BLOCK_CELLS:
                stop = start + (stop - start + 1) // 2
            yield slice(start, stop), slice(start - rows.start, stop - rows.start)
            start = stop

    def fill(self, values_bP: Tensor, block: slice, value: float) -> None:
        """Set the masked cells of a block."""
        if len(self._masks.repeated):
            values_bP.index_fill_(1, self._masks.repeated, value)
        if self._masks.num_cells(block):
            values_bP[self._masks.cells(block)] = value
