"""Which training pairs a model can find again: the consistency filter of weakly supervised data.

A pair stays if its passage is among the k nearest of its query in a pool of random passages. Pairs that noise has put
together are far from each other and fall out. Source: E5 (Wang et al. 2022, arXiv 2212.03533, section 3.1), k = 2 in a
million. Other positives of the query do not count against a pair.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.data.datasets import RetrievalData
from trainer.encoder.missing import Texts, encode_missing
from trainer.encoder.model import Encoder, Traits, weights_digest
from trainer.encoder.shards import DEFAULTS, EncodeSettings, Shards, open_shards
from trainer.encoder.tokens import tokenize_side
from trainer.encoder.topk import merge_top_k, top_k
from trainer.encoder.towers import SIDES
from trainer.errors import InputError
from trainer.handoff.manifest import disk_error
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


def refuse_full(out: Path) -> None:
    """Raise InputError if something would be overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; give --out a new folder, or delete that one")


def write_filtered(data: RetrievalData, found: Consistency, out: Path) -> None:
    """Write the data set in BEIR's form without the pairs that fell out, whole or not at all; other splits as they are."""
    refuse_full(out)
    if not found.is_kept.any():
        raise InputError(f"no pair of {data.path} stays; set --top-k higher, --pool lower, or take another --model")
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        (staging / "qrels").mkdir(parents=True)
        for name, texts in (("corpus", data.corpus), ("queries", data.queries)):
            with open(staging / f"{name}.jsonl", "w", encoding="utf-8") as file:
                for row in texts:
                    file.write(json.dumps({"_id": row["_id"], "title": "", "text": row["text"]}, ensure_ascii=False) + "\n")
        for split in data.qrels:
            _write_judgements(data, split, found, staging / "qrels" / f"{split}.tsv")
        if out.exists():
            out.rmdir()
        os.rename(staging, out)
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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


def _write_judgements(data: RetrievalData, split: str, found: Consistency, path: Path) -> None:
    qrels = data.qrels[split]
    is_kept = np.ones(len(qrels.scores), bool)
    if split == found.split:
        is_kept[found.places] = found.is_kept
        with_positive = np.unique(qrels.query_rows[is_kept & (qrels.scores > 0)])
        is_kept &= np.isin(qrels.query_rows, with_positive)
    kept = np.flatnonzero(is_kept)
    queries, passages = data.queries.select(qrels.query_rows[kept]), data.corpus.select(qrels.corpus_rows[kept])
    with open(path, "w", encoding="utf-8") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for query, passage, score in zip(queries["_id"], passages["_id"], qrels.scores[kept], strict=True):
            file.write(f"{query}\t{passage}\t{score:g}\n")
