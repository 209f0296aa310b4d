"""nDCG@10, MRR@10 and recall of an encoder on one split, with the corpus sharded over the ranks.

Embeddings go through the run's shards, so what the miner or an interrupted evaluation has encoded is not encoded again.
Figures are those of `ir-measures`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
from ir_measures import RR, R, nDCG
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.data.datasets import RetrievalData
from trainer.encoder.model import Traits, weights_digest
from trainer.encoder.shards import Shards, drop_torn, open_shards
from trainer.encoder.tokens import tokenize_side
from trainer.encoder.topk import merge_top_k, top_k
from trainer.errors import InputError
from trainer.world import World

MEASURES = {"ndcg@10": nDCG @ 10, "mrr@10": RR @ 10, "recall@10": R @ 10, "recall@100": R @ 100}
DEPTH = 100  # the deepest cut-off above


class Stopped(Exception):
    """The evaluation was left because one rank was asked to stop; what it encoded stays."""


def evaluate(
    world: World,
    data: RetrievalData,
    split: str,
    encoder: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    traits: Traits,
    shards_root: Path,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Return the measures of a split; the same on every rank up to the last bits of a product.

    encoder: the bare encoder, not its DDP wrapper.
    on_progress: called with texts done and to do, of this rank.
    Raises Stopped on every rank if one is asked to stop. Collective.
    """
    query_rows = judged_queries(data, split)
    passages = tokenize_side(data, "corpus", tokenizer, traits)
    queries = tokenize_side(data, "queries", tokenizer, traits).select(query_rows)
    digest = weights_digest(encoder)
    sides = [(open_shards(shards_root, digest, traits.pooling, tokens), tokens) for tokens in (queries, passages)]
    _encode_missing(world, encoder, sides, on_progress, should_stop)
    query_QD = sides[0][0].read_rows(np.arange(len(query_rows)))
    scores, ids = _search(world, query_QD, sides[1][0])
    return world.broadcast(measure(data, split, query_rows, scores, ids) if world.speaks else None)


def judged_queries(data: RetrievalData, split: str) -> np.ndarray:
    """Return the rows of the queries with a positive in a split; raises InputError if there is no such split."""
    if split not in data.qrels:
        raise InputError(f"{data.path} has no qrels/{split}.tsv, only {', '.join(sorted(data.qrels))}; choose one as split")
    return data.training_queries(split)


def measure(
    data: RetrievalData, split: str, query_rows: np.ndarray, scores_Qk: np.ndarray, ids_Qk: np.ndarray
) -> dict[str, float]:
    """Return the measures of ranked lists, ids -1 where a list is shorter; judgements as the split has them."""
    qrels: dict[str, dict[str, int]] = {}
    judged = data.qrels[split]
    for query, passage, score in zip(judged.query_rows, judged.corpus_rows, judged.scores, strict=True):
        qrels.setdefault(str(query), {})[str(passage)] = math.ceil(score)  # trec_eval has whole grades
    run = {
        str(row): {str(i): float(s) for i, s in zip(ids, scores, strict=True) if i >= 0}
        for row, ids, scores in zip(query_rows, ids_Qk, scores_Qk, strict=True)
    }
    wanted = {key: qrels[key] for key in run}
    values = ir_measures.calc_aggregate(list(MEASURES.values()), wanted, run)
    return {name: round(float(values[measure]), 6) for name, measure in MEASURES.items()}


def _encode_missing(
    world: World,
    encoder: nn.Module,
    sides: list[tuple[Shards, Any]],
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> None:
    """Encode what no one has encoded yet, shards dealt out over the ranks; raise Stopped on all if one must stop."""
    if world.speaks:
        for shards, _ in sides:
            drop_torn(shards)
    # Rank 0's list, for the miner may add shards at any moment.
    missing = world.broadcast([(side, shard) for side, (shards, _) in enumerate(sides) for shard in shards.missing()])
    mine = missing[world.rank :: world.num_ranks]
    total, done = sum(len(sides[side][0].rows(shard)) for side, shard in mine), 0
    for side, shard in mine:
        if should_stop():
            break
        shards, tokens = sides[side]
        shards.encode(shard, encoder, tokens, lambda n: None)
        done += len(shards.rows(shard))
        on_progress(done, total)
    if world.all_max([int(should_stop())])[0]:
        raise Stopped


def _search(world: World, query_QD: np.ndarray, shards: Shards) -> tuple[np.ndarray, np.ndarray]:
    """Return the merged best of all shards on rank 0, empty arrays elsewhere. Collective."""
    found = [
        top_k(query_QD, shards.read(shard), DEPTH, first_id=int(shards.rows(shard)[0]))
        for shard in range(world.rank, shards.num_shards, world.num_ranks)
    ]
    nothing = np.full((len(query_QD), DEPTH), -np.inf, np.float32), np.full((len(query_QD), DEPTH), -1, np.int64)
    parts = world.gather_objects(merge_top_k(found or [nothing], DEPTH))
    return merge_top_k(parts, DEPTH) if parts else nothing
