"""How one tile of queries gets its negatives: find, filter, rerank, sample, fill up with random passages.

It asks a retriever for candidates and for scores, knows no index and no file, and holds one tile. Each rank works on its
share of the tile; the tables of candidates are tensors on its device.
"""

import numpy as np
import torch
from torch import Tensor

from mining.find.retrieve import Retriever, last_negatives, with_others
from mining.find.search import share_of
from mining.ranks import Ranks
from mining.table.fill import add_random
from mining.table.filters import Kept, Positives, drop_by_rank, drop_known
from mining.table.judgements import own_texts
from mining.table.kept import Part, Table
from mining.table.sampling import choose_candidates, is_easy, lowest_candidates
from mining.table.share import Asking, Draw, GoOn, Share, ask_teacher, hold_to_scores, hold_to_teacher, rows_and_places


def draw_tile(draw: Draw, ranks: Ranks, retriever: Retriever, tile: slice, go_on: GoOn) -> Part:
    """Return this rank's part of a tile. Collective."""
    share = _find(draw, ranks, retriever, tile, go_on)
    kept = Kept(share.ids_QK)
    unknown_QK = _filter(draw, share, kept)
    _rerank(draw, ranks, share, kept, go_on)
    drawn_QK = _sample(draw, share, kept)
    if draw.filter.when_empty == "lowest":
        drawn_QK = drawn_QK | _lowest(draw, ranks, share, unknown_QK & kept.empty()[:, None], go_on)
    table = _table(draw, share, drawn_QK)
    if draw.sample.num_random or draw.filter.when_empty == "random":  # alike on every rank
        table = add_random(draw, ranks, retriever, share, table, kept.empty().cpu().numpy(), go_on)
    return _part(share, kept, table)


def _find(draw: Draw, ranks: Ranks, retriever: Retriever, tile: slice, go_on: GoOn) -> Share:
    mine = share_of(tile.stop - tile.start, ranks.rank, ranks.num_ranks)
    places = slice(tile.start + mine.start, tile.start + mine.stop)
    scores, ids = retriever.find(tile)
    last = None if draw.last is None else last_negatives(draw.last, places)
    if last is not None:
        scores, ids = with_others(retriever, places, scores, ids, last[0])
    ids_QK, scores_QK = torch.as_tensor(ids, device=draw.device), torch.as_tensor(scores, device=draw.device)
    first_QK = None if last is None else _scores_at_first(ids_QK, *last)
    return Share(places, _asking(draw, ranks, retriever, places, go_on), ids_QK, scores_QK, first_QK)


def _asking(draw: Draw, ranks: Ranks, retriever: Retriever, places: slice, go_on: GoOn) -> Asking:
    indptr, positive_rows = draw.judgements.positives(places)
    place_Q, teacher_scores = np.arange(places.start, places.stop), None
    if draw.reranker is not None:
        teacher_scores = ask_teacher(draw, ranks, np.repeat(place_Q, np.diff(indptr)), positive_rows, go_on)
    positives = Positives(indptr, retriever.score_positives(places), teacher_scores)
    own = own_texts(draw.judgements, places, draw.keys, draw.device)
    deciding_Q = positives.deciding(positives.scores, draw.filter.positive)
    return Asking(place_Q, draw.judgements.query_rows[places], own, positives, deciding_Q)


def _scores_at_first(ids_QK: Tensor, last_ids_QL: np.ndarray, last_scores_QL: np.ndarray) -> Tensor:
    """Return what each candidate scored when it was first drawn, (Q, K) float32; NaN where the last version has it not."""
    first_QK = torch.full(ids_QK.shape, torch.nan, device=ids_QK.device)
    last_ids, last_scores = (torch.from_numpy(found).to(ids_QK.device) for found in (last_ids_QL, last_scores_QL))
    for place in range(last_ids.shape[1]):
        is_it_QK = (ids_QK == last_ids[:, place, None]) & (ids_QK >= 0)
        first_QK = torch.where(is_it_QK, last_scores[:, place, None], first_QK)
    return first_QK


def _filter(draw: Draw, share: Share, kept: Kept) -> Tensor:
    """Drop candidates by what is known of them, by rank and by score; return which are not known to be wrong, (Q, K) bool."""
    share.counts["candidates"] = kept.num_left
    drop_known(draw.filter, kept, share.ids_QK, share.asking.own)
    unknown_QK = kept.mask_QK
    if draw.filter.range_min:
        query_n, at_n = rows_and_places(unknown_QK & (unknown_QK.cumsum(1) <= draw.filter.range_min))
        share.early = query_n, share.ids_QK.flatten()[at_n].cpu().numpy()
    drop_by_rank(draw.filter, kept)
    hold_to_scores(draw, share.asking, kept, share.scores_QK)
    return unknown_QK


def _rerank(draw: Draw, ranks: Ranks, share: Share, kept: Kept, go_on: GoOn) -> None:
    """Drop candidates by the cross-encoder's scores, if there is one. Collective, as hold_to_teacher."""
    if draw.reranker is not None:
        kept.narrow("rerank_top_k", kept.mask_QK.cumsum(1) <= draw.rerank.top_k)
    share.teacher_QK = hold_to_teacher(draw, ranks, share.asking, kept, share.ids_QK, share.scores_QK, go_on)
    share.counts["queries_without"] = int(kept.empty().count_nonzero())


def _sample(draw: Draw, share: Share, kept: Kept) -> Tensor:
    """Return which of the candidates that passed become negatives, (Q, K) bool."""
    stays_QK = None
    if share.first_QK is not None:
        stays_QK = share.first_QK.isfinite() & ~is_easy(draw.sample, share.scores_QK, share.first_QK)
        share.first_QK = torch.where(stays_QK, share.first_QK, share.scores_QK)
    asking, chance = share.asking, (draw.seed, draw.version)
    table = share.ids_QK, share.scores_QK, kept.mask_QK, asking.positive_score_Q
    drawn_QK = choose_candidates(draw.sample, chance, asking.rows, *table, stays_QK)
    share.counts["stayed"] = 0 if stays_QK is None else int((drawn_QK & stays_QK).count_nonzero())
    return drawn_QK


def _lowest(draw: Draw, ranks: Ranks, share: Share, unknown_QK: Tensor, go_on: GoOn) -> Tensor:
    """Return which candidates of the lowest scores the rules on scores admit, (Q, K) bool. Collective, as hold_to_teacher."""
    kept = Kept(torch.where(unknown_QK, share.ids_QK, -1))
    hold_to_scores(draw, share.asking, kept, share.scores_QK)
    kept.narrow("higher", lowest_candidates(draw.sample.num_negatives - draw.sample.num_random, kept.mask_QK))
    teacher_QK = hold_to_teacher(draw, ranks, share.asking, kept, share.ids_QK, share.scores_QK, go_on)
    if teacher_QK is not None and share.teacher_QK is not None:
        share.teacher_QK = torch.where(kept.mask_QK, teacher_QK, share.teacher_QK)
    return kept.mask_QK


def _table(draw: Draw, share: Share, drawn_QK: Tensor) -> Table:
    """Return the negatives as a table; column "query": place within the share."""
    query_n, at_n = rows_and_places(drawn_QK)
    columns = {"ids": share.ids_QK, "scores": share.scores_QK}
    if draw.sample.replace == "easy":
        columns["first_scores"] = share.scores_QK if share.first_QK is None else share.first_QK
    if share.teacher_QK is not None:
        columns["teacher_scores"] = share.teacher_QK
    return {"query": query_n} | {name: found_QK.flatten()[at_n].cpu().numpy() for name, found_QK in columns.items()}


def _part(share: Share, kept: Kept, table: Table) -> Part:
    lengths = np.bincount(table.pop("query"), minlength=len(share.asking.rows))
    of_positives = share.asking.positives
    positives = {"positive_scores": of_positives.scores, "positive_teacher_scores": of_positives.teacher_scores}
    table |= {name: scores for name, scores in positives.items() if scores is not None}
    return Part(share.places.start, lengths, table, share.counts, kept.dropped)
