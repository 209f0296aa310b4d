"""Which training pairs a model can find again: the consistency filter of weakly supervised data.

A pair stays if its passage is among the k nearest of its query in a pool of random passages. Pairs that noise has put
together are far from each other and fall out. Source: E5 (Wang et al. 2022, arXiv 2212.03533, section 3.1), k = 2 in a
million. Other positives of the query do not count against a pair.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.data.convert import write_collection
from trainer.data.datasets import RetrievalData
from trainer.data.survey import lost_in_collection, say_lost
from trainer.encoder.missing import Texts, encode_missing
from trainer.encoder.model import Encoder, Traits, weights_digest
from trainer.encoder.settings import EncodeSettings
from trainer.encoder.shards import DEFAULTS, Shards, open_shards
from trainer.encoder.tokens import tokenize_side
from trainer.encoder.topk import merge_top_k, top_k
from trainer.encoder.towers import SIDES
from trainer.errors import InputError
from trainer.handoff.beside import made_whole, refuse_full
from trainer.handoff.pins import Pins

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Consistency:
    """The pairs of one split, and which of them stay."""

    split: str
    places: np.ndarray  # (n,) int64 where in the split's judgements each pair stands
    is_kept: np.ndarray  # (n,) bool
    pool_rows: np.ndarray  # (N,) int64 corpus rows that each pair was compared with, ascending


def find_consistent(
    data: RetrievalData,
    split: str,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    traits: Traits,
    shards_root: Path,
    *,
    k: int,
    pool: int,
    seed: int,
    encode: EncodeSettings = DEFAULTS,
) -> Consistency:
    """Return which pairs of a split stay: the passage is among the query's k nearest of `pool` random passages and itself."""
    query_rows = data.training_queries(split)
    indptr, places = data.positive_judgements(query_rows, split)
    positive_rows = data.qrels[split].corpus_rows[places]
    num_passages = len(data.corpus)
    pool_rows = np.sort(np.random.default_rng(seed).choice(num_passages, min(pool, num_passages), replace=False))
    needed = np.union1d(pool_rows, positive_rows)
    queries = tokenize_side(data, "queries", tokenizer, traits).select(query_rows)
    passages = tokenize_side(data, "corpus", tokenizer, traits).select(needed)
    log.info("%d queries and %d passages, of them %d random ones, to encode", len(query_rows), len(needed), len(pool_rows))
    keys, is_pool = passages.keys(np.arange(len(needed))), np.isin(needed, pool_rows)
    positive_p = np.searchsorted(needed, positive_rows)
    with Pins() as pins:
        digest = weights_digest(encoder)
        texts = [
            Texts(
                open_shards(shards_root, digest, traits.pooling, tokens, encoder, side, encode, pins), encoder.side(side), tokens
            )
            for side, tokens in zip(SIDES, (queries, passages), strict=True)
        ]
        encode_missing(texts)
        is_kept = _within_top_k(texts[0].shards, texts[1].shards, indptr, positive_p, is_pool, keys, k)
    return Consistency(split, places, is_kept, pool_rows)


def write_filtered(data: RetrievalData, found: Consistency, out: Path) -> None:
    """Write the data set in BEIR's form without the pairs that fell out, whole or not at all; other splits as they are."""
    refuse_full(out)
    if not found.is_kept.any():
        raise InputError(f"no pair of {data.path} stays; set --top-k higher, --pool lower, or take another --model")
    for sentence in say_lost(lost_in_collection(data), "BEIR"):
        log.warning("%s", sentence)
    places = {split: _kept_places(data, split, found) for split in data.qrels}
    with made_whole(out) as beside:
        write_collection(beside, data, places)


def _within_top_k(
    queries: Shards,
    passages: Shards,
    indptr: np.ndarray,
    positive_p: np.ndarray,
    is_pool: np.ndarray,
    keys: np.ndarray,
    k: int,
) -> np.ndarray:
    """Return whether each positive is among the k nearest passages of its query, (n,) bool,
    one shard of queries at a time.

    indptr, positive_p: the positives of each query, as rows of the passages' shards.
    is_pool, keys: of each passage, whether it is in the pool, and its content key.
    """
    is_kept = np.zeros(len(positive_p), bool)
    for shard in range(queries.num_shards):
        rows = queries.rows(shard)
        query_QD = queries.read(shard)
        # As many more as a query has positives, which are passed over.
        depth = k + int(np.diff(indptr)[rows].max())
        best = [
            top_k(query_QD, passages.read(s), depth, int(passages.rows(s)[0]), is_pool[passages.rows(s)])
            for s in range(passages.num_shards)
        ]
        scores_Qk, ids_Qk = merge_top_k(best, depth)
        for place, row in enumerate(rows):
            own = slice(indptr[row], indptr[row + 1])
            is_other = ~np.isin(keys[ids_Qk[place]], keys[positive_p[own]]) & (ids_Qk[place] >= 0)
            others = scores_Qk[place][is_other]
            worst_allowed = others[k - 1] if len(others) >= k else -np.inf
            is_kept[own] = passages.read_rows(positive_p[own]) @ query_QD[place] >= worst_allowed
    return is_kept


def _kept_places(data: RetrievalData, split: str, found: Consistency) -> np.ndarray:
    """Return which judgements of a split stay: those of a query that lost its positives go with them."""
    qrels = data.qrels[split]
    is_kept = np.ones(len(qrels.scores), bool)
    if split == found.split:
        is_kept[found.places] = found.is_kept
        with_positive = np.unique(qrels.query_rows[is_kept & (qrels.scores > 0)])
        is_kept &= np.isin(qrels.query_rows, with_positive)
    return np.flatnonzero(is_kept)
