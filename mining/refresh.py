"""From candidates to a table of negatives, one tile of queries at a time: find, filter, rerank, sample.

Memory holds one tile of candidates and the negatives drawn so far. Each rank works on its share of every tile; rank 0
puts the rows together.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mining.candidates import Retriever, last_negatives, with_others
from mining.filters import FilterSettings, Kept, Keys, OwnTexts, drop_known, drop_suspected, is_first_of_its_key, is_listed
from mining.judgements import Judgements, own_texts
from mining.ranks import Ranks
from mining.rerank import Reranker, RerankSettings, drop_by_cross_encoder
from mining.sampling import SampleSettings, choose_candidates, is_easy, lowest_candidates, random_rows
from mining.search import QUERY_TILE, share_of
from mining.tiles import KeptTiles, Part, Table
from trainer.handoff.negatives import Negatives

SPARE = 16  # rows drawn from the corpus beyond those needed, in place of those that are no negatives

GoOn = Callable[[float], None]  # told which share of a tile's pairs is done


@dataclass(frozen=True)
class Draw:
    """What negatives are drawn by, and for whom."""

    filter: FilterSettings
    sample: SampleSettings
    rerank: RerankSettings
    seed: int
    version: int
    judgements: Judgements
    keys: tuple[Keys, ...]  # of all training queries and passages
    reranker: Reranker | None = None
    last: Negatives | None = None  # whose negatives stay until they are easy; None: none do


@dataclass(frozen=True)
class Drawn:
    """The negatives of all queries, in CSR form, and what was counted on the way."""

    indptr: np.ndarray
    ids: np.ndarray
    scores: np.ndarray
    more: dict[str, np.ndarray]  # the optional arrays of a version, by their names there
    counts: dict[str, int]  # candidates; queries_without, of whose candidates none passed; random and stayed negatives
    dropped: dict[str, int]  # by filter


@dataclass
class Share:
    """One rank's queries of a tile, with their candidates, best first."""

    places: slice
    rows: np.ndarray  # (Q,) of queries.jsonl
    own: OwnTexts
    ids_QK: np.ndarray
    scores_QK: np.ndarray
    first_QK: np.ndarray  # score when first drawn, of those that the last version has; NaN, and inf for random ones
    teacher_QK: np.ndarray  # NaN where the cross-encoder was not asked
    positives: Table  # of every positive
    best: dict[str, np.ndarray]  # of each query's best positive, (Q,); as positives
    counts: dict[str, int] = field(default_factory=dict)


def draw_negatives(
    draw: Draw,
    ranks: Ranks,
    retriever: Retriever,
    kept: KeptTiles,
    on_progress: Callable[[int, int], None],
    query_tile: int = QUERY_TILE,
) -> Drawn | None:
    """Return the negatives on rank 0, None elsewhere.

    kept: where an earlier service may have left what it drew, and this one leaves it, too.
    on_progress: called with queries done and to do.
    query_tile: queries retrieved at once; changes nothing but the memory.
    Raises Stopped on every rank if one is asked to stop. Collective.
    """
    parts: list[Part] = []
    num_queries = draw.judgements.num_queries
    tiles = [slice(start, min(start + query_tile, num_queries)) for start in range(0, num_queries, query_tile)]

    def take_kept() -> list[slice]:
        kept.open()
        found = {tile.start: kept.read(tile) for tile in tiles}
        parts.extend(part for taken in found.values() for part in taken or [])
        return [tile for tile in tiles if found[tile.start] is None]

    for tile in ranks.decide(take_kept):
        go_on = functools.partial(_go_on, ranks, on_progress, tile, num_queries)
        ranks.together(go_on)
        part = _draw_tile(draw, ranks, retriever, tile, go_on)
        ranks.together(functools.partial(kept.keep, part))
        parts.append(part)
    gathered = ranks.gather(parts)
    return _join([part for parts in gathered for part in parts]) if ranks.speaks else None


def _go_on(ranks: Ranks, on_progress: Callable[[int, int], None], tile: slice, num_queries: int, share_done: float = 0) -> None:
    """Tell how far a tile is; raises Stopped if any rank was asked to stop."""
    on_progress(int(tile.start + share_done * (tile.stop - tile.start)), num_queries)
    ranks.check_stop()


def _draw_tile(draw: Draw, ranks: Ranks, retriever: Retriever, tile: slice, go_on: GoOn) -> Part:
    """Return this rank's part of a tile; column "query" of the table on the way: place within the share."""
    share = _find(draw, ranks, retriever, tile, go_on)
    kept, unknown_QK = _filter(draw, ranks, share, go_on)
    drawn_QK = _choose(draw, share, kept, unknown_QK)
    table = _columns(share, drawn_QK)
    if draw.sample.num_random or draw.filter.when_empty == "random":  # alike on every rank: BM25's scores are collective
        table = _with_random(draw, retriever, share, table, kept.empty())
    order = np.lexsort((table["ids"], -table["scores"], table["query"]))
    table = {name: column[order] for name, column in table.items()}
    if draw.reranker is None:
        del table["teacher_scores"]
    else:
        new = np.isnan(table["teacher_scores"])
        table["teacher_scores"][new] = _ask_teacher(draw, ranks, share.places, table["query"][new], table["ids"][new], go_on)
    if draw.sample.replace == "all":
        del table["first_scores"]
    lengths = np.bincount(table.pop("query"), minlength=len(share.rows))
    return Part(share.places.start, lengths, table | share.positives, share.counts, kept.dropped)


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
    positives: dict[str, np.ndarray | None] = {"positive_scores": retriever.score_positives(places)}
    if draw.reranker is not None:
        query_n = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        positives["positive_teacher_scores"] = _ask_teacher(draw, ranks, places, query_n, positive_rows, go_on)
    known = {name: scores for name, scores in positives.items() if scores is not None}
    return Share(
        places=places,
        rows=draw.judgements.query_rows[places],
        own=own_texts(draw.judgements, places, draw.keys),
        ids_QK=ids_QK,
        scores_QK=scores_QK,
        first_QK=first_QK,
        teacher_QK=np.full(ids_QK.shape, np.nan, np.float32),
        positives=known,
        best={name: np.maximum.reduceat(scores, indptr[:-1]) for name, scores in known.items()},
    )


def _filter(draw: Draw, ranks: Ranks, share: Share, go_on: GoOn) -> tuple[Kept, np.ndarray]:
    """Return which candidates passed all filters, and the mask of those of which nothing is known, (Q, K)."""
    kept = Kept(share.ids_QK)
    share.counts["candidates"] = int(kept.mask_QK.sum())
    drop_known(draw.filter, kept, share.ids_QK, share.own)
    unknown_QK = kept.mask_QK
    drop_suspected(draw.filter, kept, share.scores_QK, share.best.get("positive_scores"))
    if draw.reranker is not None:
        kept.narrow("rerank_top_k", kept.mask_QK.cumsum(1) <= draw.rerank.top_k)
        query_n, at_n = np.nonzero(kept.mask_QK)
        ids = share.ids_QK[query_n, at_n]
        share.teacher_QK[query_n, at_n] = _ask_teacher(draw, ranks, share.places, query_n, ids, go_on)
        drop_by_cross_encoder(draw.rerank, kept, share.teacher_QK, share.best["positive_teacher_scores"])
    share.counts["queries_without"] = int(kept.empty().sum())
    return kept, unknown_QK


def _choose(draw: Draw, share: Share, kept: Kept, unknown_QK: np.ndarray) -> np.ndarray:
    """Return which candidates become negatives, (Q, K) bool."""
    stays_QK = np.isfinite(share.first_QK) & ~is_easy(draw.sample, share.scores_QK, share.first_QK)
    drawn_QK = choose_candidates(
        draw.sample, draw.seed, draw.version, share.rows, share.ids_QK, share.scores_QK, kept.mask_QK,
        share.best.get("positive_scores"), stays_QK,
    )  # fmt: skip
    share.counts["stayed"] = int((drawn_QK & stays_QK).sum())
    share.first_QK = np.where(stays_QK, share.first_QK, share.scores_QK)
    if draw.filter.when_empty == "lowest":
        drawn_QK |= kept.empty()[:, None] & lowest_candidates(draw.sample.num_negatives, unknown_QK)
    return drawn_QK


def _columns(share: Share, drawn_QK: np.ndarray) -> Table:
    return {
        "query": np.nonzero(drawn_QK)[0],
        "ids": share.ids_QK[drawn_QK],
        "scores": share.scores_QK[drawn_QK],
        "first_scores": share.first_QK[drawn_QK],
        "teacher_scores": share.teacher_QK[drawn_QK],
    }


def _with_random(draw: Draw, retriever: Retriever, share: Share, table: Table, is_empty_Q: np.ndarray) -> Table:
    """Return the table with passages from the whole corpus: a share of all negatives, and all of a query that has none.

    They pass the filters of what is known; that one is a positive which nobody judged is as likely as in a batch.
    """
    falls_back_Q = is_empty_Q & (draw.filter.when_empty == "random")
    num_Q = np.where(falls_back_Q, draw.sample.num_negatives, draw.sample.num_random)
    allowed_rows = np.flatnonzero(draw.judgements.allowed_N)
    ids_QR = random_rows(draw.seed, draw.version, share.rows, int(num_Q.max(initial=0)) + SPARE, allowed_rows)
    kept = Kept(ids_QR)
    drawn_indptr = np.searchsorted(table["query"], np.arange(len(share.rows) + 1))
    kept.narrow("drawn", ~is_listed(ids_QR, drawn_indptr, table["ids"]))
    kept.narrow("repeated", is_first_of_its_key(ids_QR, kept.mask_QK))
    drop_known(draw.filter, kept, ids_QR, share.own)
    taken_QR = kept.mask_QK & (kept.mask_QK.cumsum(1) <= num_Q[:, None])
    share.counts["random"] = int(taken_QR.sum())
    scores = retriever.score(share.places, np.where(taken_QR, ids_QR, -1))[taken_QR]
    more = {"query": np.nonzero(taken_QR)[0], "ids": ids_QR[taken_QR], "scores": scores}
    # Infinite: the next version draws others.
    more |= {"first_scores": np.full_like(scores, np.inf), "teacher_scores": np.full_like(scores, np.nan)}
    return {name: np.concatenate([column, more[name]]) for name, column in table.items()}


def _ask_teacher(
    draw: Draw, ranks: Ranks, places: slice, query_n: np.ndarray, passage_rows: np.ndarray, go_on: GoOn
) -> np.ndarray:
    """Return the cross-encoder's score of some pairs, queries ascending. Collective: one's request to stop is everyone's."""
    reranker = draw.reranker
    assert reranker is not None
    return ranks.together(lambda: reranker.score(query_n + places.start, passage_rows, go_on))


def _scores_at_first(ids_QK: np.ndarray, last_ids_QL: np.ndarray, last_scores_QL: np.ndarray) -> np.ndarray:
    """Return what each candidate scored when it was first drawn, (Q, K) float32; NaN where the last version has it not."""
    first_QK = np.full(ids_QK.shape, np.nan, np.float32)
    for place in range(last_ids_QL.shape[1]):
        is_it = (ids_QK == last_ids_QL[:, place, None]) & (ids_QK >= 0)
        first_QK = np.where(is_it, last_scores_QL[:, place, None], first_QK)
    return first_QK


def _join(parts: list[Part]) -> Drawn:
    # Shares of no query have the place of the next one; they add nothing, in any order.
    parts.sort(key=lambda part: part.place)
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    indptr = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))])
    counts, dropped = _sum(part.counts for part in parts), _sum(part.dropped for part in parts)
    return Drawn(indptr, columns.pop("ids"), columns.pop("scores"), columns, counts, dropped)


def _sum(counters: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for counter in counters:
        for name, count in counter.items():
            total[name] = total.get(name, 0) + count
    return total
