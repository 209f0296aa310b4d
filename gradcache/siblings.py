"""The other positives of a row: which of them stand on this rank, and which are this rank's rows'."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcache.exchange import starts
from gradcache.field import Field, Group
from gradcache.masks import Related
from gradcache.terms import Siblings
from gradcache.transfers import read_together, upload

# Q rows of all ranks, B rows of this rank, W ranks, c cells, s siblings

MOST_SIBLINGS = 100_000_000  # on a rank, some 60 bytes each


@dataclass(frozen=True, kw_only=True)
class Kin:
    """What the siblings of a direction are found from."""

    group: Group  # columns of the other side
    first: int  # where they begin among the direction's columns
    related: Related  # the direction's rows and this rank's columns of the group
    rows: range  # the direction's rows among those of all ranks
    own_related: Related | None  # this rank's rows and the columns of all ranks, where columns are spread
    own_rows: range
    target_first_Q: Tensor  # the first column of the text of each row's own positive
    columns_of_ranks: list[int]


def siblings_of(field: Field, kin: Sequence[Kin]) -> list[Siblings]:
    """Return the siblings of some directions; none unless the objective wants them.

    Waits for the device once for all, where they are wanted. Raises ValueError where they are too many to list.
    """
    device = field.keys.query_Q.device
    if not field.options.objective.wants_siblings:
        return [_none(field, len(each.own_rows), device) for each in kin]
    found = [cells for each in kin for cells in _cells_of(field, each)]
    numbers = iter(read_together([counts for cells in found for counts in cells.to_read]))
    known = iter([_Found.of(cells, next(numbers), next(numbers)) for cells in found])
    return [_siblings(field, each, *(next(known) for _ in range(1 if each.own_related is None else 2))) for each in kin]


@dataclass(frozen=True)
class _Cells:
    """Rows and other ones of their positives, rank by rank, of which the host does not know yet how many they are."""

    row: Tensor  # (c,) the siblings first, and then as many cells as are none
    column: Tensor
    to_read: tuple[Tensor, Tensor]  # (W,) siblings of each rank's rows, or in each rank's columns; (t,) of each row


@dataclass(frozen=True)
class _Found:
    """The same, cut to the siblings."""

    row: Tensor
    column: Tensor
    num_of_ranks: list[int]
    num_of_rows: Tensor  # on the host

    @classmethod
    def of(cls, cells: _Cells, num_of_ranks: Tensor, num_of_rows: Tensor) -> "_Found":
        total = int(num_of_ranks.sum())
        return cls(cells.row[:total], cells.column[:total], num_of_ranks.tolist(), num_of_rows)


def _none(field: Field, num_rows: int, device: torch.device) -> Siblings:
    none, zeros = torch.zeros(0, dtype=torch.int64, device=device), [0] * len(field.counts.queries)
    num_of_own = torch.zeros(num_rows, dtype=torch.int64)
    return Siblings(row=none, column=none, sent=zeros, own_row=none, received=zeros, num_of_own=num_of_own, values={})


def _cells_of(field: Field, kin: Kin) -> list[_Cells]:
    """Return the siblings among this rank's columns and, where columns are spread, those of this rank's rows."""
    group, targets = kin.group, kin.target_first_Q[kin.rows.start : kin.rows.stop]
    if kin.own_related is None:
        return [_others(kin.related, len(kin.rows), group.window.start, targets, None)]
    own_targets = kin.target_first_Q[kin.own_rows.start : kin.own_rows.stop]
    return [
        _others(kin.related, len(kin.rows), group.window.start, targets, ("row", field.counts.queries)),
        _others(kin.own_related, len(kin.own_rows), 0, own_targets, ("column", kin.columns_of_ranks)),
    ]


def _others(
    related: Related, num_rows: int, first_column: int, targets_t: Tensor, by: tuple[str, Sequence[int]] | None
) -> _Cells:
    """Return the cells of all rows, those of the text of a row's own positive last. Raises ValueError where they are too many.

    by: whether the rank of a cell is that of its row or of its column, and how many of them each rank has; None: of one rank.
    """
    if (num_cells := related.num_cells(slice(0, num_rows))) > MOST_SIBLINGS:
        raise ValueError(
            f"this objective would list {num_cells} pairs of a row and another of its positives, more than {MOST_SIBLINGS}; "
            "set one that sees the row's own positive alone, such as info_nce, or a smaller batch"
        )
    row, column = related.cells(slice(0, num_rows))
    is_other = column + first_column != targets_t[row]
    rank, num_ranks = torch.zeros_like(row), 1
    if by is not None:
        rank, num_ranks = _owner(row if by[0] == "row" else column, by[1]), len(by[1])
    rank = torch.where(is_other, rank, num_ranks)
    order, one = rank.argsort(stable=True), torch.ones_like(rank)
    num_of_ranks = row.new_zeros(num_ranks + 1).index_add_(0, rank, one)[:num_ranks]
    num_of_rows = row.new_zeros(num_rows).index_add_(0, row, is_other.to(row.dtype))
    return _Cells(row[order], column[order], (num_of_ranks, num_of_rows))


def _siblings(field: Field, kin: Kin, here: _Found, own: _Found | None = None) -> Siblings:
    first_column = kin.group.window.start if own is None else 0
    own = here if own is None else own
    return Siblings(
        row=here.row,
        column=here.column + kin.first,
        sent=here.num_of_ranks,
        own_row=own.row,
        received=own.num_of_ranks,
        num_of_own=own.num_of_rows,
        values=_values(field, kin.group, own.row, own.column + first_column),
    )


def _values(field: Field, group: Group, row_s: Tensor, column_s: Tensor) -> dict[str, Tensor]:
    """Return what the batch says of this rank's queries' judged positives; nothing of a passage's queries."""
    batch = field.batch
    if not batch.positive_values or group.row_keys is not field.keys.positives:
        return {}
    key_s = group.column_keys.values_m[column_s]  # texts have one key each
    known = batch.positives.to(key_s.device)
    ordered = torch.cat([known.values_m, key_s]).sort().values
    known_number, number = (torch.searchsorted(ordered, keys) for keys in (known.values_m, key_s))  # equal for equal keys
    most = len(ordered) + 1
    known_pair, wanted = known.rows_m * most + known_number, row_s * most + number
    order = known_pair.argsort()
    place = order[torch.searchsorted(known_pair[order], wanted).clamp(max=max(0, len(order) - 1))] if len(order) else wanted
    return {name: upload(values, key_s.device)[place] for name, values in batch.positive_values.items()}


def _owner(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rank of each row of all ranks."""
    edges = upload(torch.tensor(starts(counts)[1:]), rows.device)
    return torch.searchsorted(edges, rows, right=True)
