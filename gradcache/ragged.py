"""Some 64-bit integers for each of several rows, as many as a row needs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradcache.transfers import upload

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
        return Ragged(upload(self.values_m, device), upload(self.counts_n, device))

    def slice(self, rows: range, values: range) -> "Ragged":
        """Return some consecutive rows; values: where theirs stand among those of all rows."""
        return Ragged(self.values_m[values.start : values.stop], self.counts_n[rows.start : rows.stop])

    def with_column(self, value_n: Tensor) -> "Ragged":
        """Return rows that have one value more each, whether they have it already or not."""
        rows_m = torch.cat([self.rows_m, torch.arange(len(value_n), device=value_n.device)])
        order_m = rows_m.argsort(stable=True)
        return Ragged(torch.cat([self.values_m, value_n])[order_m], self.counts_n + 1)

    def distinct(self) -> "Ragged":
        """Return rows that have each value once, in rising order. Waits for the device of a row's values."""
        rows_m, values_m = sorted_pairs(self.rows_m, self.values_m)
        is_new_m = is_new(rows_m, values_m)
        return Ragged(values_m[is_new_m], torch.bincount(rows_m[is_new_m], minlength=len(self.counts_n)))


def sorted_pairs(first_m: Tensor, second_m: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs of integers, sorted by the first and then by the second."""
    order_m = second_m.argsort()
    order_m = order_m[first_m[order_m].argsort(stable=True)]
    return first_m[order_m], second_m[order_m]


def is_new(first_m: Tensor, second_m: Tensor) -> Tensor:
    """Return, for pairs that are sorted, whether each is the first of those that are equal."""
    is_new_m = torch.ones_like(first_m, dtype=torch.bool)
    is_new_m[1:] = (first_m[1:] != first_m[:-1]) | (second_m[1:] != second_m[:-1])
    return is_new_m
