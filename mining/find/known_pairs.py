"""Scores of the pairs that are known before the stream, taken while the shards of their passages pass by.

Positives, the last version's negatives, the first random passages and BM25's candidates are functions of what every rank has.
So every rank lists all of them without a message, scores those of the shards that it sees, and tells a query's owner later.
Each pair is summed in one fixed order: no bit of a score depends on the ranks, or on what else is scored.

Memory of a rank: `bytes_of_pair` for each pair of a pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mining.find.search import share_of
from mining.ranks import Ranks
from mining.settings import SPARE_RANDOM, SampleSettings
from mining.table.judgements import Judgements
from mining.table.sampling import random_rows
from trainer.encoder.pair_scores import score_pairs
from trainer.handoff.negatives import Negatives

PairsOf = Callable[[slice], tuple[np.ndarray, np.ndarray]]  # places of queries to (indptr, passage rows; -1: none)

ROW_BITS, NO_ROW = 32, (1 << 32) - 1  # of a pair as one number; the search has no such row either
BLOCK_QUERIES, BLOCK_PAIRS = 1 << 14, 1 << 20  # that are listed, or put in order, at once


@dataclass(frozen=True)
class Listed:
    """Some passages of every query, in CSR form."""

    indptr: np.ndarray  # (Q + 1,) int64
    rows: np.ndarray  # corpus rows

    def __call__(self, places: slice) -> tuple[np.ndarray, np.ndarray]:
        indptr = np.asarray(self.indptr[places.start : places.stop + 1])
        return indptr - indptr[0], np.asarray(self.rows[indptr[0] : indptr[-1]])

    def table(self, places: slice) -> np.ndarray:
        """Return the passages of some queries, (n, longest) int64; -1 fills up."""
        indptr, rows = self(places)
        counts = np.diff(indptr)
        ids_nL = np.full((len(counts), counts.max(initial=0)), -1, np.int64)
        ids_nL[np.arange(ids_nL.shape[1]) < counts[:, None]] = rows
        return ids_nL


@dataclass(frozen=True)
class Scored:
    """The scores of some pairs of this rank's share of a tile."""

    first: int  # place of the share's first query
    keys: np.ndarray  # (n,) int64, ascending: query within the share and passage row
    scores: np.ndarray  # (n,) float32

    @staticmethod
    def none() -> "Scored":
        return Scored(0, np.zeros(0, np.int64), np.zeros(0, np.float32))

    def of(self, query_places: np.ndarray, passage_rows: np.ndarray) -> np.ndarray:
        """Return the score of any pairs, float32; NaN where it is not known."""
        if len(self.keys) == 0:
            return np.full(len(query_places), np.nan, np.float32)
        keys = (query_places - self.first << ROW_BITS) | passage_rows
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.scores[at], np.float32(np.nan))


class KnownPairs:
    """All pairs of a pass that are known before the stream, each once: the same list on every rank."""

    def __init__(self, places: slice, query_PD: Tensor, sources: list[PairsOf], shard_rows: int, num_passages: int):
        """places: of the pass. query_PD: its queries as they are stored, on the device, where pairs are scored."""
        self._first, self._query_PD, self._shard_rows = places.start, query_PD, shard_rows
        self._indptr, self._row_n = _list_pairs(places, sources)
        self._order_n, self._starts = _by_shard(self._row_n, shard_rows, -(-num_passages // shard_rows))
        self._score_n = np.full(len(self._row_n), np.nan, np.float32)

    def see(self, shard: int, vectors: Tensor | np.ndarray) -> None:
        """Score the pairs of a shard of this rank, (rows, D) as it is stored: on the device, or mapped from disk."""
        pair_n = self._order_n[self._starts[shard] : self._starts[shard + 1]]
        if len(pair_n) == 0:
            return
        device = self._query_PD.device
        passage_ND = vectors if isinstance(vectors, Tensor) else torch.tensor(vectors, device=device)
        query_n = np.searchsorted(self._indptr, pair_n, side="right") - 1
        passage_n = self._row_n[pair_n].astype(np.int64) - shard * self._shard_rows
        at = (torch.from_numpy(each).to(device) for each in (query_n, passage_n))
        self._score_n[pair_n] = score_pairs(self._query_PD, passage_ND, *at).cpu().numpy()

    def bring(self, ranks: Ranks, tile: slice) -> Scored:
        """Return the scores of this rank's share of a tile, from the ranks that saw the shards. Collective.

        Every rank sends 4 bytes for each pair of the tile; what it did not see is NaN.
        """
        shares = [share_of(tile.stop - tile.start, rank, ranks.num_ranks) for rank in range(ranks.num_ranks)]
        cuts = [self._indptr[[tile.start + at - self._first for at in (share.start, share.stop)]] for share in shares]
        found_Rn = np.stack(ranks.exchange_arrays([self._score_n[start:stop] for start, stop in cuts]))
        assert ((~np.isnan(found_Rn)).sum(0) == 1).all(), "a pair of a query and a passage was not scored by exactly one rank"
        first = tile.start + shares[ranks.rank].start
        of_share = slice(first - self._first, tile.start + shares[ranks.rank].stop - self._first + 1)
        start, stop = cuts[ranks.rank]
        return Scored(first, _keys(self._indptr[of_share], self._row_n[start:stop]), np.fmax.reduce(found_Rn))


def known_before(
    judgements: Judgements, sample: SampleSettings, seed: int, version: int, last: Negatives | None, words: Listed | None
) -> list[PairsOf]:
    """Return what lists the pairs that a draw will ask for, as far as it is known before.

    last: whose negatives may stay, or None. words: candidates of another search, or None.
    """
    sources: list[PairsOf] = [judgements.positives]
    if last is not None and sample.replace == "easy":
        sources.append(Listed(last.indptr, last.ids))
    if sample.num_random:
        draws = range(sample.num_random + SPARE_RANDOM)

        def random(places: slice) -> tuple[np.ndarray, np.ndarray]:
            rows_QR = random_rows(judgements, seed, version, judgements.query_rows[places], draws)
            return np.arange(len(rows_QR) + 1) * len(draws), rows_QR.ravel()

        sources.append(random)
    return sources if words is None else [*sources, words]


def list_together(ranks: Ranks, find: Callable[[slice], np.ndarray], num_queries: int, query_tile: int) -> Listed:
    """Return on every rank what each finds for its share of every tile of queries: 4 bytes a passage. Collective.

    find: takes a tile and returns ids, (share, K); -1: none. Every rank calls it for every tile.
    """
    lengths, rows = [np.zeros(1, np.int64)], [np.zeros(0, np.uint32)]
    for start in range(0, num_queries, query_tile):
        own = find(slice(start, min(start + query_tile, num_queries))).astype(np.uint32)  # -1 becomes NO_ROW
        ids_QK = np.concatenate(ranks.exchange_arrays([own] * ranks.num_ranks))
        is_there_QK = ids_QK != NO_ROW
        lengths.append(is_there_QK.sum(1))
        rows.append(ids_QK[is_there_QK])
    return Listed(np.cumsum(np.concatenate(lengths)), np.concatenate(rows))


def bytes_of_pair(num_pairs: int) -> int:
    """Return the bytes that a rank holds for each of so many pairs: its passage, its score and its place among its shard's."""
    return 4 + 4 + _place_type(num_pairs).itemsize


def _place_type(num_pairs: int) -> np.dtype:
    return np.dtype(np.uint32 if num_pairs <= NO_ROW else np.int64)


def _list_pairs(places: slice, sources: list[PairsOf]) -> tuple[np.ndarray, np.ndarray]:
    """Return (indptr int64, passage rows uint32) of the pairs of some queries, each once, rows ascending."""
    lengths, rows = [np.zeros(1, np.int64)], [np.zeros(0, np.uint32)]
    for start in range(places.start, places.stop, BLOCK_QUERIES):
        block = slice(start, min(start + BLOCK_QUERIES, places.stop))
        keys = np.sort(np.concatenate([_keys(*source(block)) for source in sources]))
        keys = keys[np.diff(keys, prepend=-1) > 0]  # numpy's unique hashes integers, and takes 15 times as long
        lengths.append(np.bincount(keys >> ROW_BITS, minlength=block.stop - block.start))
        rows.append((keys & NO_ROW).astype(np.uint32))
    return np.cumsum(np.concatenate(lengths)), np.concatenate(rows)


def _keys(indptr: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return (query, passage row) of each pair as one int64, without those of row -1."""
    query_n = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    keys = (query_n << ROW_BITS) | rows
    return keys[rows >= 0]


def _by_shard(row_n: np.ndarray, shard_rows: int, num_shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of pairs ordered by the shard of their passage, and where each shard's begin, (num_shards + 1,)."""
    # Numpy sorts numbers of 16 bits in linear time.
    shard_type = np.uint16 if num_shards <= 1 << 16 else np.int64
    blocks = range(0, len(row_n), BLOCK_PAIRS)

    def shard_of(start: int) -> np.ndarray:
        return (row_n[start : start + BLOCK_PAIRS] // np.uint32(shard_rows)).astype(shard_type)

    counts = sum((np.bincount(shard_of(start), minlength=num_shards) for start in blocks), np.zeros(num_shards, np.int64))
    starts = np.concatenate([[0], np.cumsum(counts)])
    order_n, filled = np.empty(len(row_n), _place_type(len(row_n))), starts[:-1].copy()
    for start in blocks:
        shard_b = shard_of(start)
        count = np.bincount(shard_b, minlength=num_shards)
        # A block's pairs of a shard follow those of the blocks before it.
        at_b = np.repeat(filled - (np.cumsum(count) - count), count) + np.arange(len(shard_b))
        order_n[at_b] = start + np.argsort(shard_b, kind="stable")
        filled += count
    return order_n, starts
