"""Which columns are no negatives of a row, found by 64-bit content keys.

A row leads to its keys and a key to the columns that have it. Both lists are as long as what is known of the texts: 65,536 rows
that share one text take 65,536 entries, where their pairs would be billions. Pairs exist for one block of rows at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from gradcache.ragged import Ragged, distinct

# t rows, N columns of all ranks, P columns of this rank, e entries (a row and one of its keys), c cells


@dataclass(frozen=True)
class Related:
    """The cells of rows and columns that have a key in common, row by row."""

    row_e: Tensor
    first_e: Tensor  # where the columns of the entry's key begin in `column_k`
    count_e: Tensor
    column_k: Tensor  # columns of this rank, key by key; of several columns of one text the first
    entry_start: Sequence[int]  # (t + 1,) on the host: where the entries of a row begin
    cell_start: Sequence[int]  # (t + 1,) on the host: where the cells of a row begin

    def num_cells(self, rows: slice) -> int:
        """Return the cells of some rows; a cell of several common keys counts for each."""
        return int(self.cell_start[rows.stop] - self.cell_start[rows.start])

    def cells(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return (row, column) of all cells of some consecutive rows; rows count from the first of them. No wait for a device."""
        first, stop = int(self.entry_start[rows.start]), int(self.entry_start[rows.stop])
        count = self.count_e[first:stop]
        entry = torch.arange(stop - first, device=count.device).repeat_interleave(count, output_size=self.num_cells(rows))
        place = torch.arange(len(entry), device=count.device) - (count.cumsum(0) - count)[entry]
        return self.row_e[first:stop][entry] - rows.start, self.column_k[self.first_e[first:stop][entry] + place]


@dataclass(frozen=True)
class Masks:
    """The cells of some rows and of this rank's columns that are no negatives; a row's own positive is one of them."""

    repeated: Tensor  # (r,) columns whose text an earlier column of any rank has: masked in every row
    related: Sequence[tuple[int, Related]]  # with the column that theirs count from

    def cells(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return (row, column) of the masked cells of some rows in other columns; a cell may come twice."""
        found = [(row, column + first) for first, related in self.related for row, column in [related.cells(rows)]]
        return torch.cat([row for row, _ in found]), torch.cat([column for _, column in found])

    def num_cells(self, rows: slice) -> int:
        """Return how many `cells` returns."""
        return sum(related.num_cells(rows) for _, related in self.related)


def first_columns(keys_N: Tensor) -> Tensor:
    """Return for every column the first one of equal key, (N,)."""
    distinct_keys, place = torch.unique(keys_N, return_inverse=True)
    first = torch.full_like(distinct_keys, len(keys_N))
    first.scatter_reduce_(0, place, torch.arange(len(keys_N), device=keys_N.device), "amin")
    return first[place]


def repeated_columns(first_N: Tensor, window: range) -> Tensor:
    """Return those of this rank's columns whose text an earlier column has, counted from the window's start."""
    first_P = first_N[window.start : window.stop]
    return (first_P != torch.arange(window.start, window.stop, device=first_N.device)).nonzero()[:, 0]


def relate(row_keys: Ragged, column_keys: Ragged, first_N: Tensor, window: range) -> Related:
    """Return where rows and this rank's columns have a key in common.

    column_keys: of the columns of all ranks; what one column of a text has, its first column has. first_N: that column.
    window: this rank's columns among them; the cells' columns count from its start. Waits for the device a few times.
    """
    column_m = first_N[column_keys.rows_m]
    is_here = (column_m >= window.start) & (column_m < window.stop)
    of_column = distinct(column_m[is_here] - window.start, column_keys.values_m[is_here], len(window))
    order = of_column.values_m.argsort(stable=True)  # by key, then by column
    key_k, column_k = of_column.values_m[order], of_column.rows_m[order]
    rows = distinct(row_keys.rows_m, row_keys.values_m, len(row_keys.counts_n))
    first_e = torch.searchsorted(key_k, rows.values_m)
    count_e = torch.searchsorted(key_k, rows.values_m, right=True) - first_e
    has_any = count_e > 0
    row_e, first_e, count_e = rows.rows_m[has_any], first_e[has_any], count_e[has_any]
    entries_t = torch.bincount(row_e, minlength=len(row_keys.counts_n))
    cells_t = torch.zeros_like(entries_t).index_add_(0, row_e, count_e)
    return Related(row_e, first_e, count_e, column_k, starts_of(entries_t), starts_of(cells_t))


def starts_of(counts_t: Tensor) -> Sequence[int]:
    """Return where the values of each row begin, and where all end, on the host: one wait for the device."""
    return cast(Sequence[int], torch.nn.functional.pad(counts_t.cumsum(0), (1, 0)).cpu().numpy())
