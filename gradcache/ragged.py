"""Some 64-bit integers for each of several rows, as many as a row needs."""

from dataclasses import dataclass

import torch
from torch import Tensor

# n rows, m values of all rows


@dataclass(frozen=True)
class Ragged:
    """The values of all rows one behind the other, row after row."""

    values_m: Tensor  # int64
    counts_n: Tensor  # int64: values of each row

    @staticmethod
    def of_table(table_nM: Tensor) -> "Ragged":
        """Return the rows of a table, all of one length."""
        return Ragged(table_nM.flatten(), torch.full((len(table_nM),), table_nM.shape[1], device=table_nM.device))

    @property
    def rows_m(self) -> Tensor:
        """The row of each value."""
        rows_n = torch.arange(len(self.counts_n), device=self.values_m.device)
        return rows_n.repeat_interleave(self.counts_n, output_size=len(self.values_m))

    def to(self, device: torch.device) -> "Ragged":
        """Return the same on a device."""
        return Ragged(self.values_m.to(device), self.counts_n.to(device))

    def slice(self, rows: slice) -> "Ragged":
        """Return some consecutive rows. It waits for the device."""
        first, stop = int(self.counts_n[: rows.start].sum()), int(self.counts_n[: rows.stop].sum())
        return Ragged(self.values_m[first:stop], self.counts_n[rows])

    def with_column(self, value_n: Tensor) -> "Ragged":
        """Return rows that have one value more each; rows keep distinct values only."""
        rows_m = torch.cat([torch.arange(len(value_n), device=value_n.device), self.rows_m])
        return distinct(rows_m, torch.cat([value_n, self.values_m]), len(self.counts_n))


def distinct(rows_m: Tensor, values_m: Tensor, num_rows: int) -> Ragged:
    """Return the pairs of a row and a value, each once, sorted by row and then by value."""
    order_m = values_m.argsort()
    order_m = order_m[rows_m[order_m].argsort(stable=True)]
    rows_m, values_m = rows_m[order_m], values_m[order_m]
    is_new_m = torch.ones_like(rows_m, dtype=torch.bool)
    is_new_m[1:] = (rows_m[1:] != rows_m[:-1]) | (values_m[1:] != values_m[:-1])
    return Ragged(values_m[is_new_m], torch.bincount(rows_m[is_new_m], minlength=num_rows))
