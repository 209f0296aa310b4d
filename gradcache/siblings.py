"""The other positives of a row: which of them stand on this rank, and which are this rank's rows'."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradcache.exchange import starts
from gradcache.field import Field, Group
from gradcache.masks import Related
from gradcache.objectives.tile import OTHER_SIDE
from gradcache.terms import Siblings

# Q rows of all ranks, s siblings

MOST_SIBLINGS = 100_000_000  # on a rank, some 60 bytes each


def siblings_of(
    field: Field,
    group: Group,
    related: tuple[int, Related],
    window: range,
    own_window: range,
    target_first_Q: Tensor,
    is_spread: bool,
) -> Siblings:
    """Return the siblings of a direction whose columns of the other side are `group`; none unless the objective wants them.

    window, own_window: rows of the term, and of this rank, among those of all. target_first_Q: the first column of the text of
    each row's own positive. Raises ValueError where they are too many to list.
    """
    none = target_first_Q.new_zeros(0)
    num_ranks = len(field.counts.queries)
    if not field.options.objective.wants_siblings:
        return Siblings(row=none, column=none, sent=[0] * num_ranks, own_row=none, received=[0] * num_ranks, values={})
    row, column = _others(related[1], window, group.window.start, target_first_Q)
    if not is_spread:
        values = _sibling_values(field, group, row, column + group.window.start)
        return Siblings(row=row, column=column + related[0], sent=[len(row)], own_row=row, received=[len(row)], values=values)
    name = "passages" if group.kind == OTHER_SIDE and group.source is field.pools.passage else "queries"
    every = range(sum(getattr(field.counts, name)))
    own_row, own_column = _others(group.related(own_window, every), own_window, 0, target_first_Q)
    of_rank = _owner(own_column, getattr(field.counts, name))
    order = of_rank.argsort(stable=True)
    return Siblings(
        row=row,
        column=column + related[0],
        sent=torch.bincount(_owner(row, field.counts.queries), minlength=num_ranks).tolist(),
        own_row=own_row[order],
        received=torch.bincount(of_rank, minlength=num_ranks).tolist(),
        values=_sibling_values(field, group, own_row[order], own_column[order]),
    )


def _others(related: Related, rows: range, first_column: int, target_first_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cells of all rows but those of the text of the row's own positive. Raises ValueError where they are too many."""
    if (num_cells := related.num_cells(slice(0, len(rows)))) > MOST_SIBLINGS:
        raise ValueError(
            f"this objective would list {num_cells} pairs of a row and another of its positives, more than {MOST_SIBLINGS}; "
            "set one that sees the row's own positive alone, such as info_nce, or a smaller batch"
        )
    row, column = related.cells(slice(0, len(rows)))
    is_other = column + first_column != target_first_Q[rows.start : rows.stop][row]
    return row[is_other], column[is_other]


def _sibling_values(field: Field, group: Group, row_s: Tensor, column_s: Tensor) -> dict[str, Tensor]:
    """Return what the batch says of this rank's queries' judged positives; nothing of a passage's queries."""
    batch = field.batch
    if not batch.positive_values or group.row_keys is not field.keys.positives:
        return {}
    key_s = group.column_keys.values_m[column_s]  # texts have one key each
    known = batch.positives.to(key_s.device)
    _, number = torch.unique(torch.cat([known.values_m, key_s]), return_inverse=True)
    most = int(number.max()) + 1 if len(number) else 1
    known_pair = known.rows_m * most + number[: len(known.values_m)]
    wanted = row_s * most + number[len(known.values_m) :]
    order = known_pair.argsort()
    place = order[torch.searchsorted(known_pair[order], wanted).clamp(max=max(0, len(order) - 1))] if len(order) else wanted
    return {name: values.to(key_s.device)[place] for name, values in batch.positive_values.items()}


def _owner(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rank of each row of all ranks."""
    edges = torch.tensor(starts(counts)[1:], device=rows.device)
    return torch.searchsorted(edges, rows, right=True)
