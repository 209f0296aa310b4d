"""Which columns are no negatives of a row, found by 64-bit content keys.

Everything is sparse: pairs are found by sorting and binary search, never by comparing all rows with all columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# B rows, N columns, M keys of a row, K keys of a column


@dataclass(frozen=True)
class Masks:
    """The positive and the masked columns of each row."""

    target_B: Tensor  # column of each row's own positive
    repeated: Tensor  # (r,) columns whose text an earlier column has; masked, except in rows whose target they are
    pair_rows: Tensor  # (p,) ascending; with pair_columns: the other masked cells, positives of the row and copies of its target
    pair_columns: Tensor  # (p,)
    pair_is_sibling: Tensor  # (p,) bool: a positive of another text than the target's

    def num_masked(self) -> int:
        """Return the number of masked cells of the B x N scores."""
        num_own = int(torch.isin(self.target_B, self.repeated).sum())
        return len(self.pair_rows) + len(self.target_B) * len(self.repeated) - num_own


def mask_passages(target_B: Tensor, positive_keys_BM: Tensor, passage_keys_N: Tensor) -> Masks:
    """Return the masks of queries against passages: a query's positives are those whose key is among its keys."""
    first_N = _first_columns(passage_keys_N)
    distinct = _repeated(first_N).logical_not().nonzero()[:, 0]
    rows, found = _equal_keys(positive_keys_BM, passage_keys_N[distinct][:, None])
    return _masks(target_B, first_N, rows, distinct[found])


def mask_queries(target_B: Tensor, row_keys_B: Tensor, query_keys_N: Tensor, positive_keys_NK: Tensor) -> Masks:
    """Return the masks of passages against queries: a passage's positives are the queries that have its key among theirs.

    Of several queries with one text, one that has it is enough.
    """
    rows, columns = _equal_keys(row_keys_B[:, None], positive_keys_NK)
    return _masks(target_B, _first_columns(query_keys_N), rows, columns)


def add_same_side(masks: Masks, num_columns: int, row_keys_BM: Tensor, column_keys_NK: Tensor, text_keys_N: Tensor) -> Masks:
    """Return masks with further columns behind the first `num_columns`: the rows of the same side.

    Of those a column is no negative of a row if they have a key in common. text_keys_N: the columns' content keys, each
    text counts once.
    """
    first_N = _first_columns(text_keys_N)
    rows, columns = _equal_keys(row_keys_BM, column_keys_NK)
    cells = torch.unique(rows * max(1, len(first_N)) + first_N[columns])
    added = cells // max(1, len(first_N)), cells % max(1, len(first_N)) + num_columns
    pair_rows, order = torch.cat([masks.pair_rows, added[0]]).sort(stable=True)
    return Masks(
        masks.target_B,
        torch.cat([masks.repeated, _repeated(first_N).nonzero()[:, 0] + num_columns]),
        pair_rows,
        torch.cat([masks.pair_columns, added[1]])[order],
        torch.cat([masks.pair_is_sibling, torch.zeros_like(added[0], dtype=torch.bool)])[order],
    )


def _masks(target_B: Tensor, first_N: Tensor, rows: Tensor, columns: Tensor) -> Masks:
    """Return masks from pairs of a row and a column that is a positive of it, in any order, repeats allowed."""
    num_columns = max(1, len(first_N))
    cells = torch.unique(rows * num_columns + first_N[columns])  # sorted by row, then by column
    rows, columns = cells // num_columns, cells % num_columns
    is_other = columns != target_B[rows]
    rows, columns = rows[is_other], columns[is_other]
    is_sibling = columns != first_N[target_B][rows]
    return Masks(target_B, _repeated(first_N).nonzero()[:, 0], rows, columns, is_sibling)


def _first_columns(keys_N: Tensor) -> Tensor:
    """Return for every column the first one of equal key, (N,)."""
    distinct, place = torch.unique(keys_N, return_inverse=True)
    first = torch.full_like(distinct, len(keys_N))
    first.scatter_reduce_(0, place, torch.arange(len(keys_N), device=keys_N.device), "amin")
    return first[place]


def _repeated(first_N: Tensor) -> Tensor:
    return first_N != torch.arange(len(first_N), device=first_N.device)


def _equal_keys(row_keys_BM: Tensor, column_keys_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return all pairs (row, column) that have a key in common; a pair is repeated for every such key."""
    ordered, order = column_keys_NK.flatten().sort()
    wanted = row_keys_BM.flatten()
    start = torch.searchsorted(ordered, wanted)
    count = torch.searchsorted(ordered, wanted, right=True) - start
    # The i-th wanted key stands at ordered[start[i] : start[i] + count[i]]; `entry` numbers all of them through.
    source = torch.arange(len(wanted), device=wanted.device).repeat_interleave(count)
    entry = torch.arange(len(source), device=wanted.device) - (count.cumsum(0) - count)[source]
    return source // row_keys_BM.shape[1], order[start[source] + entry] // column_keys_NK.shape[1]
