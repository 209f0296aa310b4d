"""What was drawn, read as one table: for tests, whose tables are small."""

from dataclasses import dataclass

import numpy as np

from mining.table.audit import row_ends
from mining.table.kept import Drawn


@dataclass
class Whole:
    """A table in CSR form, with what was counted."""

    indptr: np.ndarray
    ids: np.ndarray
    scores: np.ndarray
    more: dict[str, np.ndarray]
    counts: dict[str, int]
    dropped: dict[str, int]


def whole(drawn: Drawn) -> Whole:
    """Return the table of a draw by one rank, from the parts on disk."""
    parts = [part for _, part in drawn.read()]
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in drawn.sizes}
    assert {name: len(column) for name, column in columns.items()} == drawn.sizes
    indptr = row_ends(np.concatenate([part.lengths for part in parts]))
    return Whole(indptr, columns.pop("ids"), columns.pop("scores"), columns, drawn.counts, drawn.dropped)
