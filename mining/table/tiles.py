"""From candidates to a table of negatives, one tile of queries at a time.

Memory holds one tile of candidates. Each rank works on its share of every tile and keeps what it drew on disk alone.
"""

import functools
from collections.abc import Callable

from mining.find.retrieve import Retriever
from mining.ranks import Ranks
from mining.table.draw import draw_tile
from mining.table.kept import KeptTiles
from mining.table.share import Draw
from trainer.handoff.retry import patiently


def draw_tiles(
    draw: Draw, ranks: Ranks, retriever: Retriever, kept: KeptTiles, tiles: list[slice], on_progress: Callable[[int, int], None]
) -> None:
    """Draw negatives for some tiles of queries, and keep each rank's part of each on disk.

    on_progress: called with queries done and to do. Raises Stopped on every rank if one is asked to stop. Collective.
    """
    for tile in tiles:
        go_on = functools.partial(_go_on, ranks, on_progress, tile, draw.judgements.num_queries)
        ranks.together(go_on)
        part = draw_tile(draw, ranks, retriever, tile, go_on)
        ranks.together(functools.partial(patiently, functools.partial(kept.keep, part), "negatives that are drawn"))


def tiles_of(todo: list[slice], query_tile: int, places: slice | None = None) -> list[slice]:
    """Return the tiles of the queries that have no negatives yet; places: within which."""
    tiles = []
    for part in todo:
        first, stop = (part.start, part.stop) if places is None else (max(part.start, places.start), min(part.stop, places.stop))
        tiles += [slice(start, min(start + query_tile, stop)) for start in range(first, stop, query_tile)]
    return tiles


def _go_on(ranks: Ranks, on_progress: Callable[[int, int], None], tile: slice, num_queries: int, share_done: float = 0) -> None:
    """Tell how far a tile is; raises Stopped if any rank was asked to stop."""
    on_progress(int(tile.start + share_done * (tile.stop - tile.start)), num_queries)
    ranks.check_stop()
