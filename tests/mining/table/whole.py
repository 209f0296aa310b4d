"""What was drawn, read as one table: for tests, whose tables are small."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mining.find.retrieve import Retriever
from mining.ranks import Ranks
from mining.table.audit import row_ends
from mining.table.kept import Drawn, KeptTiles
from mining.table.share import Draw
from mining.table.tiles import draw_tiles, tiles_of


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


def draw_negatives(
    draw: Draw, ranks: Ranks, retriever: Retriever, kept: KeptTiles, on_progress: Callable, query_tile: int = 4096
) -> Drawn:
    """Draw what is missing of all queries, in one pass, as a refresh does."""
    kept.open()
    tiles = tiles_of(kept.missing(draw.judgements.num_queries), query_tile)
    draw_tiles(draw, ranks, retriever, kept, tiles, on_progress)
    return kept.gather(ranks, draw.judgements.num_queries)
