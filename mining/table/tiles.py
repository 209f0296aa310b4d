"""From candidates to a table of negatives, one tile of queries at a time: find, filter, rerank, sample.

Memory holds one tile of candidates. Each rank works on its share of every tile and keeps what it drew on disk alone.
"""

import functools
from collections.abc import Callable

import numpy as np

from mining.find.retrieve import Retriever, last_negatives, with_others
from mining.find.search import share_of
from mining.ranks import Ranks
from mining.table.draw import Draw, GoOn, Share, ask_teacher, hold_to_scores, hold_to_teacher
from mining.table.fill import add_random
from mining.table.filters import Kept, Positives, drop_by_rank, drop_known
from mining.table.judgements import own_texts
from mining.table.kept import KeptTiles, Part, Table
from mining.table.sampling import choose_candidates, is_easy, lowest_candidates
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
        part = _draw_tile(draw, ranks, retriever, tile, go_on)
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


def _draw_tile(draw: Draw, ranks: Ranks, retriever: Retriever, tile: slice, go_on: GoOn) -> Part:
    """Return this rank's part of a tile; column "query" of the table on the way: place within the share."""
    share = _find(draw, ranks, retriever, tile, go_on)
    kept, fallback_QK = _filter(draw, ranks, share, go_on)
    table = _columns(share, _choose(draw, share, kept) | fallback_QK)
    if draw.sample.num_random or draw.filter.when_empty == "random":  # alike on every rank
        table = add_random(draw, ranks, retriever, share, table, kept.empty(), go_on)
    order = np.lexsort((table["ids"], -table["scores"], table["query"]))
    table = {name: column[order] for name, column in table.items()}
    if draw.reranker is None:
        del table["teacher_scores"]
    if draw.sample.replace == "all":
        del table["first_scores"]
    lengths = np.bincount(table.pop("query"), minlength=len(share.rows))
    positives = {"positive_scores": share.positives.scores, "positive_teacher_scores": share.positives.teacher_scores}
    table |= {name: scores for name, scores in positives.items() if scores is not None}
    return Part(share.places.start, lengths, table, share.counts, kept.dropped)


def _find(draw: Draw, ranks: Ranks, retriever: Retriever, tile: slice, go_on: GoOn) -> Share:
    scores_QK, ids_QK = retriever.find(tile)
    mine = share_of(tile.stop - tile.start, ranks.rank, ranks.num_ranks)
    places = slice(tile.start + mine.start, tile.start + mine.stop)
    first_QK = np.full(ids_QK.shape, np.nan, np.float32)
    if draw.last is not None:
        last_ids_QL, last_scores_QL = last_negatives(draw.last, places)
        scores_QK, ids_QK = with_others(retriever, places, scores_QK, ids_QK, last_ids_QL)
        first_QK = _scores_at_first(ids_QK, last_ids_QL, last_scores_QL)
    indptr, positive_rows = draw.judgements.positives(places)
    teacher_scores = None
    if draw.reranker is not None:
        query_n = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        teacher_scores = ask_teacher(draw, ranks, places, query_n, positive_rows, go_on)
    positives = Positives(indptr, retriever.score_positives(places), teacher_scores)
    return Share(
        places=places,
        rows=draw.judgements.query_rows[places],
        own=own_texts(draw.judgements, places, draw.keys),
        ids_QK=ids_QK,
        scores_QK=scores_QK,
        first_QK=first_QK,
        teacher_QK=np.full(ids_QK.shape, np.nan, np.float32),
        positives=positives,
        positive_score_Q=positives.deciding(positives.scores, draw.filter.positive),
        early_QK=np.zeros(ids_QK.shape, bool),
    )


def _filter(draw: Draw, ranks: Ranks, share: Share, go_on: GoOn) -> tuple[Kept, np.ndarray]:
    """Return which candidates passed all filters, and which others queries get of which none has, (Q, K) bool."""
    kept = Kept(share.ids_QK)
    share.counts["candidates"] = int(kept.mask_QK.sum())
    drop_known(draw.filter, kept, share.ids_QK, share.own)
    unknown_QK = kept.mask_QK
    share.early_QK = unknown_QK & (unknown_QK.cumsum(1) <= draw.filter.range_min)
    drop_by_rank(draw.filter, kept)
    hold_to_scores(draw, share, kept, share.scores_QK)
    if draw.reranker is not None:
        kept.narrow("rerank_top_k", kept.mask_QK.cumsum(1) <= draw.rerank.top_k)
    share.teacher_QK = hold_to_teacher(draw, ranks, share, kept, share.ids_QK, share.scores_QK, go_on)
    share.counts["queries_without"] = int(kept.empty().sum())
    if draw.filter.when_empty == "lowest":
        return kept, _lowest(draw, ranks, share, unknown_QK & kept.empty()[:, None], go_on)
    return kept, np.zeros(share.ids_QK.shape, bool)


def _lowest(draw: Draw, ranks: Ranks, share: Share, unknown_QK: np.ndarray, go_on: GoOn) -> np.ndarray:
    """Return which candidates of the lowest scores the rules on scores admit, (Q, K) bool. Collective, as hold_to_teacher."""
    kept = Kept(np.where(unknown_QK, share.ids_QK, -1))
    hold_to_scores(draw, share, kept, share.scores_QK)
    kept.narrow("higher", lowest_candidates(draw.sample.num_negatives - draw.sample.num_random, kept.mask_QK))
    teacher_QK = hold_to_teacher(draw, ranks, share, kept, share.ids_QK, share.scores_QK, go_on)
    share.teacher_QK = np.where(kept.mask_QK, teacher_QK, share.teacher_QK)
    return kept.mask_QK


def _choose(draw: Draw, share: Share, kept: Kept) -> np.ndarray:
    """Return which of the candidates that passed become negatives, (Q, K) bool."""
    stays_QK = np.isfinite(share.first_QK) & ~is_easy(draw.sample, share.scores_QK, share.first_QK)
    drawn_QK = choose_candidates(
        draw.sample, draw.seed, draw.version, share.rows, share.ids_QK, share.scores_QK, kept.mask_QK,
        share.positive_score_Q, stays_QK,
    )  # fmt: skip
    share.counts["stayed"] = int((drawn_QK & stays_QK).sum())
    share.first_QK = np.where(stays_QK, share.first_QK, share.scores_QK)
    return drawn_QK


def _columns(share: Share, drawn_QK: np.ndarray) -> Table:
    return {
        "query": np.nonzero(drawn_QK)[0],
        "ids": share.ids_QK[drawn_QK],
        "scores": share.scores_QK[drawn_QK],
        "first_scores": share.first_QK[drawn_QK],
        "teacher_scores": share.teacher_QK[drawn_QK],
    }


def _scores_at_first(ids_QK: np.ndarray, last_ids_QL: np.ndarray, last_scores_QL: np.ndarray) -> np.ndarray:
    """Return what each candidate scored when it was first drawn, (Q, K) float32; NaN where the last version has it not."""
    first_QK = np.full(ids_QK.shape, np.nan, np.float32)
    for place in range(last_ids_QL.shape[1]):
        is_it = (ids_QK == last_ids_QL[:, place, None]) & (ids_QK >= 0)
        first_QK = np.where(is_it, last_scores_QL[:, place, None], first_QK)
    return first_QK
