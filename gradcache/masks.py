"""Which columns are no negatives of a row, found by 64-bit content keys.

A row leads to its keys and a key to the columns that have it. Both lists are as long as what is known of the texts: 65,536 rows
that share one text take 65,536 entries, where their pairs would be billions. Pairs exist for one block of rows at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from gradcache.ragged import Ragged, is_new, sorted_pairs
from gradcache.transfers import read_together

# t rows, N columns of all ranks, P columns of this rank, e entries (a row and one of its keys), c cells


@dataclass(frozen=True)
class Related:
    """The cells of rows and columns that have a key in common, row by row."""

    row_e: Tensor
    first_e: Tensor  # where the columns of the entry's key begin in `column_k`
    count_e: Tensor  # 0 where no column here has it
    column_k: Tensor  # columns of this rank, key by key; of several columns of one text the first
    repeated: Tensor  # columns whose text an earlier column of any rank has
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


@dataclass(frozen=True)
class Pairing:
    """Rows, and this rank's columns among those of all ranks, of which some have keys in common."""

    row_keys: Ragged
    column_keys: Ragged  # of the columns of all ranks; what one column of a text has, its first column has
    first_N: Tensor  # that column
    window: range  # this rank's columns among them; a cell's column counts from its start


def relate(pairings: Sequence[Pairing]) -> list[Related]:
    """Return where the rows and columns of each pairing have a key in common. Waits for the device, once for all."""
    drafts = [_relate(pairing) for pairing in pairings]
    found = read_together([values for draft in drafts for values in draft.to_read])
    return [
        Related(
            row_e=draft.row_e,
            first_e=draft.first_e,
            count_e=draft.count_e,
            column_k=draft.column_k,
            repeated=draft.repeated_P[: int(num_repeated[0])],
            entry_start=as_integers(entry_start),
            cell_start=as_integers(cell_start),
        )
        for draft, num_repeated, entry_start, cell_start in zip(drafts, found[::3], found[1::3], found[2::3], strict=True)
    ]


def first_columns(keys_N: Tensor) -> Tensor:
    """Return for every column the first one of equal key, (N,).

    Equal keys stand side by side once they are sorted, the first column first: half a million are ten times as fast as by search.
    """
    if not len(keys_N):
        return torch.zeros_like(keys_N)
    ordered, order = keys_N.sort(stable=True)
    is_new_N = torch.nn.functional.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)
    place_N = torch.arange(len(keys_N), device=keys_N.device)
    start_N = torch.where(is_new_N, place_N, 0).cummax(0).values
    return torch.empty_like(order).scatter_(0, order, order[start_N])


def first_of(keys_N: Tensor, wanted: Tensor) -> Tensor:
    """Return the first column of each wanted key, -1 where there is none."""
    if not len(keys_N):
        return torch.full_like(wanted, -1)
    ordered, order = keys_N.sort(stable=True)
    place = torch.searchsorted(ordered, wanted).clamp(max=len(keys_N) - 1)
    return torch.where(ordered[place] == wanted, order[place], -1)


def as_integers(host: Tensor) -> Sequence[int]:
    """Return a tensor of the host as what is indexed ten times as fast."""
    return cast(Sequence[int], host.numpy())


def starts_of(counts_t: Tensor) -> Tensor:
    """Return where the values of each row begin, and where all end, (t + 1,)."""
    return torch.nn.functional.pad(counts_t.cumsum(0), (1, 0))


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A `Related` of which the host knows no numbers yet."""

    row_e: Tensor
    first_e: Tensor
    count_e: Tensor
    column_k: Tensor
    repeated_P: Tensor  # with more behind
    to_read: tuple[Tensor, Tensor, Tensor]  # the number of repeated columns; where the entries, and the cells, of a row begin


def _relate(pairing: Pairing) -> _Draft:
    """Return where a pairing's rows and columns have a key in common; nothing here waits for the device."""
    window, first_N, columns = pairing.window, pairing.first_N, pairing.column_keys
    key_m, column_m = sorted_pairs(columns.values_m, first_N[columns.rows_m])
    is_column_m = (column_m >= window.start) & (column_m < window.stop) & is_new(key_m, column_m)
    place_m = starts_of(is_column_m.to(torch.int64))
    row_e, key_e = sorted_pairs(pairing.row_keys.rows_m, pairing.row_keys.values_m)
    first_e = place_m[torch.searchsorted(key_m, key_e)]
    # A key that a row has twice counts once.
    count_e = (place_m[torch.searchsorted(key_m, key_e, right=True)] - first_e) * is_new(row_e, key_e)
    entry_start = starts_of(pairing.row_keys.counts_n)
    place_P = torch.arange(len(window), device=first_N.device)
    is_repeated_P = first_N[window.start : window.stop] != place_P + window.start
    return _Draft(
        row_e=row_e,
        first_e=first_e,
        count_e=count_e,
        column_k=_marked_first(column_m - window.start, is_column_m),
        repeated_P=_marked_first(place_P, is_repeated_P),
        to_read=(is_repeated_P.sum()[None], entry_start, starts_of(count_e)[entry_start]),
    )


def _marked_first(values: Tensor, is_marked: Tensor) -> Tensor:
    """Return the same values, those that are marked before the others, in their order.

    It is what a selection by a mask returns, with more behind: the host would have to wait for the selection's size.
    """
    return values[is_marked.logical_not().to(torch.int8).argsort(stable=True)]
