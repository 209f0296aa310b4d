"""nDCG@10, MRR@10 and recall of an encoder on one split, with the corpus sharded over the ranks.

Embeddings go through the run's shards, so what the miner or an interrupted evaluation has encoded is not encoded again, nor
what one of them encodes at the same time. Ranks take shards one by one, and whoever is through waits with patience.
Figures are those of `ir-measures` on the whole matrix of scores: equal scores stand in the order that trec_eval gives them,
by id, descending, also where the last place of a list is shared.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import ir_measures
import numpy as np
import pyarrow.compute
from ir_measures import RR, R, nDCG
from transformers import PreTrainedTokenizerBase

from trainer.data.datasets import RetrievalData
from trainer.encoder.missing import Texts, encode_missing
from trainer.encoder.model import Encoder, Traits, weights_digest
from trainer.encoder.settings import EncodeSettings
from trainer.encoder.shards import DEFAULTS, Shards, open_shards
from trainer.encoder.tokens import tokenize_side
from trainer.encoder.topk import merge_top_k, top_k
from trainer.encoder.towers import SIDES
from trainer.errors import MachineFailed
from trainer.handoff.manifest import TornVersion
from trainer.handoff.pins import Pins
from trainer.health import SAMPLE_ROWS, evaluation_health
from trainer.patience import Patience
from trainer.world import World

MEASURES = {"ndcg@10": nDCG @ 10, "mrr@10": RR @ 10, "recall@10": R @ 10, "recall@100": R @ 100}
DEPTH = 100  # the deepest cut-off above
FOUND = DEPTH + 1  # of a query: one of them may be the document with its own id
SAMPLE_SHARDS = 32  # of the corpus, for its health
SEARCHED_ROWS = 65536  # of the corpus, searched and put in the order of their ids at once
MERGED = 8  # lists of the best, each Q x FOUND, that are kept before they become one


class Stopped(Exception):
    """The evaluation was left because one rank was asked to stop; what it encoded stays."""


def evaluate(
    world: World,
    data: RetrievalData,
    split: str,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    traits: Traits,
    shards_root: Path,
    *,
    encode: EncodeSettings = DEFAULTS,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_health: Callable[[dict[str, Any]], None] | None = None,
    on_each: Callable[[np.ndarray], None] = lambda _: None,
) -> dict[str, float]:
    """Return the measures of a split; the same on every rank up to the last bits of a product.

    encoder: the bare encoder, not its DDP wrapper.
    encode: what the encoder computes in, on the device where it is.
    on_progress: called with texts done and to do, of all ranks.
    on_health: called on rank 0 with what `split_health` finds.
    on_each: called on rank 0 with what `measure_each` finds.
    Raises Stopped on every rank if one is asked to stop, MachineFailed for a shard that is altered while it is in use.
    Collective.
    """
    query_rows, patience = data.evaluated_queries(split), Patience(world)
    tokens = {"query": tokenize_side(data, "queries", tokenizer, traits).select(query_rows)}
    tokens["passage"] = tokenize_side(data, "corpus", tokenizer, traits)
    digest = weights_digest(encoder)
    with Pins() if world.speaks else contextlib.nullcontext() as pins:
        texts = [
            Texts(
                open_shards(shards_root, digest, traits.pooling, tokens[side], encoder, side, encode, pins),
                encoder.side(side),
                tokens[side],
            )
            for side in SIDES
        ]
        encode_all(world, patience, texts, on_progress, should_stop)
        query_shards, passage_shards = (each.shards for each in texts)
        try:
            query_QD = query_shards.read_rows(np.arange(len(query_rows)))
            scores, ids = _search(world, patience, query_QD, passage_shards, data.corpus)
            scores, ids = without_own(data, split, query_rows, scores, ids)
            found = None
            if world.speaks:
                with patience.at_work():
                    if on_health is not None:
                        on_health(split_health(data, split, query_rows, query_QD, passage_shards, scores, ids))
                    each_QM = measure_each(data, split, query_rows, scores, ids)
                    on_each(each_QM)
                    found = means(each_QM)
        except TornVersion as torn:
            raise MachineFailed(f"a shard was altered or deleted while it was evaluated: {torn}") from torn
        patience.wait()
        return world.broadcast(found)


def encode_all(
    world: World,
    patience: Patience,
    texts: list[Texts],
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Return when all is encoded, by this rank, the others or the miner; raise Stopped on all if one must stop. Collective."""

    def go_on(done: int, total: int) -> None:
        if patience.is_stopping(should_stop()):
            raise Stopped
        on_progress(done, total)

    is_stopped = False
    try:
        encode_missing(texts, go_on, world.rank, world.num_ranks)
    except Stopped:
        is_stopped = True
    patience.wait()
    if world.all_max([int(is_stopped or should_stop())])[0]:
        raise Stopped


def without_own(
    data: RetrievalData, split: str, query_rows: np.ndarray, scores_Qk: np.ndarray, ids_Qk: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return ranked lists, DEPTH long, without the document that has its query's id, unless it is judged relevant.

    Source: BEIR's `ignore_identical_ids`. Lists of FOUND are long enough for it.
    """
    if not len(ids_Qk):  # of a rank that does not speak
        return scores_Qk, ids_Qk
    own_Q, num_passages = data.own_rows[query_rows], len(data.corpus)
    judged = data.qrels[split]
    relevant = (judged.query_rows * num_passages + judged.corpus_rows)[judged.scores > 0]
    is_out_Q = (own_Q >= 0) & ~np.isin(query_rows * num_passages + own_Q, relevant)
    is_out_Qk = (ids_Qk == own_Q[:, None]) & is_out_Q[:, None]
    scores_Qk, ids_Qk = np.where(is_out_Qk, -np.inf, scores_Qk), np.where(is_out_Qk, -1, ids_Qk)
    order_Qk = np.argsort(is_out_Qk, axis=1, kind="stable")[:, :DEPTH]
    return np.take_along_axis(scores_Qk, order_Qk, 1), np.take_along_axis(ids_Qk, order_Qk, 1)


def measure(
    data: RetrievalData, split: str, query_rows: np.ndarray, scores_Qk: np.ndarray, ids_Qk: np.ndarray
) -> dict[str, float]:
    """Return the measures of ranked lists, as `measure_each` takes them: the means over all queries."""
    return means(measure_each(data, split, query_rows, scores_Qk, ids_Qk))


def means(each_QM: np.ndarray) -> dict[str, float]:
    """Return the measures of a split by name; each_QM: those of each query."""
    return dict(zip(MEASURES, each_QM.mean(0).tolist(), strict=True))


def measure_each(
    data: RetrievalData, split: str, query_rows: np.ndarray, scores_Qk: np.ndarray, ids_Qk: np.ndarray
) -> np.ndarray:
    """Return what each query's ranked list measures, (Q, M) float64, columns in the order of MEASURES.

    ids_Qk: -1 where a list is shorter; judgements are as the split has them.
    """
    qrels: dict[str, dict[str, int]] = {}
    judged = data.qrels[split]
    rows = np.unique(np.concatenate([judged.corpus_rows, ids_Qk[ids_Qk >= 0]]))
    names = dict(zip(rows.tolist(), data.corpus.select(rows)["_id"], strict=True))
    for query, passage, score in zip(judged.query_rows, judged.corpus_rows, judged.scores, strict=True):
        qrels.setdefault(str(query), {})[names[int(passage)]] = math.ceil(score)  # trec_eval has whole grades
    for number, (query, score) in enumerate(zip(judged.absent_query_rows, judged.absent_scores, strict=True)):
        qrels.setdefault(str(query), {})[f"\0{number}"] = math.ceil(score)  # no text has such an id
    run = {
        str(row): {names[i]: s for i, s in zip(ids, scores, strict=True) if i >= 0}
        for row, ids, scores in zip(query_rows, ids_Qk.tolist(), scores_Qk.tolist(), strict=True)
    }
    wanted = {key: qrels[key] for key in run}
    place = {str(row): q for q, row in enumerate(query_rows.tolist())}
    column = {measure: m for m, measure in enumerate(MEASURES.values())}
    each_QM = np.zeros((len(query_rows), len(MEASURES)))
    for found in ir_measures.iter_calc(list(MEASURES.values()), wanted, run):
        each_QM[place[found.query_id], column[found.measure]] = found.value
    return each_QM


def split_health(
    data: RetrievalData,
    split: str,
    query_rows: np.ndarray,
    query_QD: np.ndarray,
    passages: Shards,
    scores_Qk: np.ndarray,
    ids_Qk: np.ndarray,
) -> dict[str, Any]:
    """Return the health of a split's embeddings and ranked lists (see trainer/health.py).

    Reads the shards of at most SAMPLE_ROWS judged pairs, and a sample of the corpus from some of them: at most one pass over
    what the search has read.
    """
    draw = np.random.default_rng(0)
    indptr, ids_J = data.positives(query_rows, split)
    rows_J = np.repeat(np.arange(len(query_rows)), np.diff(indptr))
    chosen = _some(len(ids_J), draw)
    pair_shards = np.unique(ids_J[chosen] // passages.shard_rows)
    near = np.concatenate([passages.rows(int(shard)) for shard in draw.permutation(pair_shards)[:SAMPLE_SHARDS]])
    return evaluation_health(
        query_QD,
        passages.read_rows(near[_some(len(near), draw)]),
        ids_Qk,
        scores_Qk,
        rows_J,
        ids_J,
        chosen,
        passages.read_rows(ids_J[chosen]),
        num_passages=len(data.corpus),
    )


def _some(num_rows: int, draw: np.random.Generator) -> np.ndarray:
    """Return at most SAMPLE_ROWS of the row numbers, ascending."""
    return np.sort(draw.choice(num_rows, min(SAMPLE_ROWS, num_rows), replace=False))


def _search(
    world: World, patience: Patience, query_QD: np.ndarray, shards: Shards, corpus: datasets.Dataset
) -> tuple[np.ndarray, np.ndarray]:
    """Return the merged best of all shards on rank 0, empty arrays elsewhere. Collective."""
    found = [(np.full((len(query_QD), FOUND), -np.inf, np.float32), np.full((len(query_QD), FOUND), -1, np.int64))]
    at_once = max(1, min(SEARCHED_ROWS // shards.shard_rows, -(-shards.num_shards // world.num_ranks)))
    for first in range(world.rank * at_once, shards.num_shards, world.num_ranks * at_once):
        group = range(first, min(first + at_once, shards.num_shards))
        by_name = _by_name(corpus, np.concatenate([shards.rows(shard) for shard in group]))
        passage_ND = np.concatenate([shards.read(shard) for shard in group])[by_name - by_name.min()]
        scores, places = top_k(query_QD, passage_ND, FOUND, device=world.device)
        found.append((scores, np.where(places < 0, -1, by_name[places])))
        found = [_merge(found, corpus)] if len(found) == MERGED else found
        patience.is_stopping(False)
    merged = _merge(found, corpus)
    patience.wait()
    parts = world.gather_objects(merged)
    return _merge(parts, corpus) if parts else found[0]


def _merge(parts: list[tuple[np.ndarray, np.ndarray]], corpus: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the best of several lists of the same queries, equal scores by name."""
    rows = np.unique(np.concatenate([ids for _, ids in parts], axis=1))
    rows = rows[rows >= 0]
    if not len(rows):  # of a rank without a shard
        return parts[0]
    by_name = _by_name(corpus, rows)
    place_of = np.argsort(by_name)  # of each of `rows`, which are ascending
    placed = [(scores, np.where(ids < 0, -1, place_of[np.searchsorted(rows, np.maximum(ids, rows[0]))])) for scores, ids in parts]
    scores, places = merge_top_k(placed, FOUND)
    return scores, np.where(places < 0, -1, by_name[places])


def _by_name(corpus: datasets.Dataset, rows: np.ndarray) -> np.ndarray:
    """Return rows of the corpus by the bytes of their ids, descending: how trec_eval breaks ties."""
    names = corpus.with_format("arrow").select(rows)[:]["_id"]
    return rows[pyarrow.compute.sort_indices(names, sort_keys=[("", "descending")]).to_numpy()]
