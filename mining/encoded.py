"""The embeddings that a version is mined with: planned, encoded where they are missing, opened."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mining.clusters import num_clustered
from mining.cost import Load, choose_index
from mining.encode import Embeddings, Side, encode_missing
from mining.filters import Keys
from mining.index import AUTO, IndexSettings, bytes_of_passage
from mining.passages import Base, drift_sample, earlier_base, keep_base, mean_drift
from mining.plan import MemoryPlan, Sizes, held_now, memory_limit, plan_memory
from mining.vectors import VECTORS, copy_vectors
from mining.watch import Task
from mining.work import ENCODING, Work
from trainer.encoder.shards import Shards, drop_torn, open_shards, rows_of_shard
from trainer.encoder.tokens import TokenTable
from trainer.encoder.towers import Encoder
from trainer.encoder.towers import Side as Tower
from trainer.handoff.weights import ENCODER, Checkpoint, open_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """All that the search needs to know of a checkpoint."""

    queries: Embeddings
    passages: Embeddings
    keys: tuple[Keys, ...]  # of the tokens; none where vectors were supplied
    index: IndexSettings  # "auto" resolved
    plan: MemoryPlan
    about_passages: dict[str, Any]  # for the manifest


def encode_checkpoint(work: Work, task: Task, checkpoint: Checkpoint) -> Encoded:
    """Encode what a checkpoint's version needs and is not there. Collective; raises InputError and Stopped on all."""
    job, ranks = work.job, work.ranks
    if VECTORS in checkpoint.manifest:
        return _read_vectors(work, checkpoint)
    with work.phase("loading"):
        encoder, pooling, tables = ranks.together(lambda: _read_encoder(work, checkpoint))
        config = encoder.side("passage").model.config
        held_by_token = 8 * config.hidden_size + 3 * getattr(config, "intermediate_size", 4 * config.hidden_size)
        index, plan = _plan(work, encoder.width, held_by_token)
        encoder.to(work.device)

    def open_side(tower: Tower, digest: str, tokens: TokenTable) -> Shards:
        return open_shards(job.run.folder / "shards", digest, pooling, tokens, encoder.part(tower), job.encode)

    def side(tower: Tower, digest: str, rows: np.ndarray | None = None) -> Side:
        tokens = tables[0 if tower == "query" else 1]
        tokens = tokens if rows is None else tokens.select(rows)
        return Side(tower, open_side(tower, digest, tokens), tokens)

    digest, step = checkpoint.manifest["weights_digest"], checkpoint.step
    queries, new = side("query", digest), Base(task.version, digest, step)
    base, drift = new, None
    earlier = ranks.decide(lambda: _usable_base(work, task, open_side, tables[1]))
    if earlier is not None and earlier.weights_digest != digest and job.mine.passages == "drift":
        rows = drift_sample(len(work.data.corpus), job.run.seed)
        sample, old = side("passage", digest, rows), Embeddings(open_side("passage", earlier.weights_digest, tables[1]))
        with work.phase("measuring drift"):
            encode_missing(ranks, encoder, [sample], work.progress)
            drift = ranks.decide(lambda: mean_drift(old.read(rows), Embeddings(sample.shards).read(np.arange(len(rows)))))
        log.info("drift of %d passages since step %d: %.5f", len(rows), earlier.checkpoint_step, drift)
        base = new if drift > job.mine.max_drift else replace(earlier, version=task.version)
    elif earlier is not None:
        base = replace(earlier, version=task.version)
    passages = side("passage", base.weights_digest)
    sides = [queries, passages] if base is new else [queries]  # passages of an earlier checkpoint are all there
    with work.phase(ENCODING, tokens=sum(_num_missing_tokens(side) for side in sides)):
        encode_missing(ranks, encoder, sides, work.progress)
    ranks.decide(lambda: keep_base(job.run.folder, base))
    about = {"mode": job.mine.passages, "weights_digest": base.weights_digest, "checkpoint_step": base.checkpoint_step}
    about["drift"] = None if drift is None else round(drift, 6)
    keys = (Keys(tables[0].key_of_row, tables[1].key_of_row),)
    return Encoded(Embeddings(queries.shards), Embeddings(passages.shards), keys, index, plan, about)


def _read_vectors(work: Work, checkpoint: Checkpoint) -> Encoded:
    """Return what a person supplied in the place of an encoder. Collective."""
    digest = checkpoint.manifest["weights_digest"]
    with work.phase("reading vectors"):
        queries, passages = copy_vectors(work, Path(checkpoint.manifest[VECTORS]), digest)
        index, plan = _plan(work, passages.width, token_width=0)
    about = {"mode": "supplied", "weights_digest": digest, "checkpoint_step": checkpoint.step, "drift": None}
    return Encoded(queries, passages, (), index, plan, about)


def _read_encoder(work: Work, checkpoint: Checkpoint) -> tuple[Encoder, str, list[TokenTable]]:
    """Return the encoder of a checkpoint, its pooling, and the tokens of queries and passages; raises TornVersion.

    Verified once more when it is read, on every rank: in between it may have been altered, or deleted in spite of its pin.
    """
    try:
        found = work.tokens.open(checkpoint)
    except Exception:
        open_checkpoint(checkpoint.folder, ENCODER)  # a better reason for whatever the libraries made of it
        raise
    open_checkpoint(checkpoint.folder, ENCODER)
    return found


def _num_missing_tokens(side: Side) -> int:
    return sum(int(side.tokens.lengths[side.shards.rows(shard)].sum()) for shard in side.shards.missing())


def _usable_base(work: Work, task: Task, open_side, tokens: TokenTable) -> Base | None:
    """Return the earlier embeddings to go on with, or None; those that were lost cannot be made again."""
    if work.job.mine.passages == "fresh":
        return None
    earlier = earlier_base(work.job.run.folder, task.version)
    if earlier is None:
        return None
    shards = open_side("passage", earlier.weights_digest, tokens)
    drop_torn(shards)
    if missing := shards.missing():
        log.warning("%d shards of the passages of step %d are lost: all are encoded anew", len(missing), earlier.checkpoint_step)
        return None
    return earlier


def _plan(work: Work, width: int, token_width: int) -> tuple[IndexSettings, MemoryPlan]:
    """Return the index to build and the plan, and tell both. Collective; raises InputError.

    width: of an embedding.
    token_width: numbers that an encoder holds at once for each token of a batch; 0: there is none.
    """
    job, ranks = work.job, work.ranks
    num_queries, num_passages = work.judgements.num_queries, len(work.data.corpus)
    shard_rows, device = rows_of_shard(num_passages), work.device
    index = job.index
    if index.factory == AUTO:
        audited = min(job.audit.num_queries, num_queries)
        load = Load(num_queries, num_passages, shard_rows, width, job.search.top_k, index.nprobe, audited)
        index = replace(index, factory=ranks.decide(lambda: choose_index(job.run.folder, load, device)))
    limit = memory_limit(ranks, job.mine.memory_gib)

    def plan() -> MemoryPlan:
        sizes = Sizes(
            num_queries=num_queries,
            num_passages=num_passages,
            shard_rows=shard_rows,
            width=width,
            stored_bytes=np.dtype(job.encode.stored_type).itemsize,
            token_width=token_width,
            top_k=job.search.top_k,
            num_candidates=job.num_candidates,
            num_clustered=num_clustered(job.clusters, num_queries),
            num_negatives=job.sample.num_negatives,
            num_ranks=ranks.num_ranks,
            index_bytes=bytes_of_passage(index.factory, width),
            device_type=device.type,
        )
        return plan_memory(sizes, held_now(), limit)

    # Ranks hold different amounts; their tiles must be of one size.
    own = ranks.together(plan)
    tile = min(ranks.exchange([own.query_tile] * ranks.num_ranks))
    log.info("%s", own.as_text())
    work.metrics.record(0, {"event": "planned", "index": index.factory, **own.as_json()})
    return index, replace(own, query_tile=tile)
