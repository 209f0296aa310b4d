"""The embeddings that a version is mined with: planned, encoded where they are missing, opened."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mining.disk import plan_disk
from mining.find.base import Base, drift_sample, earlier_base, keep_base, mean_drift
from mining.find.cost import Load, choose_index
from mining.find.embeddings import Embeddings, encode_together, rows_of_block
from mining.find.index import bytes_of_passage
from mining.find.supplied import VECTORS, copy_vectors
from mining.memory import MemoryPlan, Sizes, held_now, memory_limit, plan_memory
from mining.settings import AUTO, IndexSettings
from mining.table.clusters import num_clustered
from mining.table.filters import Keys
from mining.watch import Task
from mining.work import ENCODING, Work
from trainer.encoder.missing import Texts
from trainer.encoder.shards import open_shards, rows_of_shard
from trainer.encoder.tokens import TokenTable
from trainer.encoder.towers import Encoder
from trainer.encoder.towers import Side as Tower
from trainer.handoff.weights import ENCODER, Checkpoint, open_checkpoint

log = logging.getLogger(__name__)

OpenSide = Callable[[Tower, str, TokenTable], Texts]  # tower, digest of its weights, tokens


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
    queries_table, passages_table = tables

    def open_side(tower: Tower, digest: str, tokens: TokenTable) -> Texts:
        pins = work.pins if ranks.speaks else None
        shards = open_shards(job.run.folder / "shards", digest, pooling, tokens, encoder, tower, job.encode, pins)
        return Texts(shards, encoder.side(tower), tokens)

    digest = checkpoint.manifest["weights_digest"]
    queries = open_side("query", digest, queries_table)
    base, drift = _choose_base(work, task, checkpoint, open_side, passages_table)
    passages = open_side("passage", base.weights_digest, passages_table)
    # Passages of an earlier checkpoint are all there.
    _encode(work, checkpoint, [queries, passages] if base.weights_digest == digest else [queries], encoder.width)
    stays = None if job.mine.passages == "fresh" else passages.shards.folder.name
    ranks.decide(lambda: keep_base(job.run.folder, replace(base, folder=stays)))
    about = {"mode": job.mine.passages, "weights_digest": base.weights_digest, "checkpoint_step": base.checkpoint_step}
    about["drift"] = None if drift is None else round(drift, 6)
    keys = (Keys(queries_table.key_of_row, passages_table.key_of_row),)
    return Encoded(Embeddings(queries.shards), Embeddings(passages.shards), keys, index, plan, about)


def _choose_base(
    work: Work, task: Task, checkpoint: Checkpoint, open_side: OpenSide, tokens: TokenTable
) -> tuple[Base, float | None]:
    """Return whose embeddings of passages to take, and how far the new ones are from the earlier, if measured. Collective."""
    job, ranks = work.job, work.ranks
    digest = checkpoint.manifest["weights_digest"]
    new = Base(task.version, digest, checkpoint.step)
    earlier = ranks.decide(lambda: _usable_base(work, task, open_side, tokens))
    if earlier is None:
        return new, None
    same = replace(earlier, version=task.version)
    if earlier.weights_digest == digest or job.mine.passages != "drift":
        return same, None
    rows = drift_sample(len(work.data.corpus), job.run.seed)
    sample = open_side("passage", digest, tokens.select(rows))
    old = Embeddings(open_side("passage", earlier.weights_digest, tokens).shards)
    with work.phase("measuring drift"):
        encode_together(ranks, [sample], work.progress)
        drift = ranks.decide(lambda: mean_drift(old.read(rows), Embeddings(sample.shards).read(np.arange(len(rows)))))
    log.info("drift of %d passages since step %d: %.5f", len(rows), earlier.checkpoint_step, drift)
    return (new if drift > job.mine.max_drift else same), drift


def _encode(work: Work, checkpoint: Checkpoint, texts: list[Texts], width: int) -> None:
    """Report the room on disk that is needed, then encode what is missing. Collective."""
    num_tokens = 0
    if work.ranks.speaks:
        rows = [(each.tokens, each.shards.rows(shard)) for each in texts for shard in each.shards.missing()]
        num_tokens = sum(int(tokens.lengths[of_shard].sum()) for tokens, of_shard in rows)
        num_missing = sum(len(of_shard) for _, of_shard in rows)
        disk = plan_disk(work.job, work.judgements.num_queries, len(work.data.corpus), width, num_missing)
        work.metrics.record(checkpoint.step, {"event": "planned disk", **disk.as_json()})
    with work.phase(ENCODING, tokens=num_tokens):
        encode_together(work.ranks, texts, work.progress)


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


def _usable_base(work: Work, task: Task, open_side: OpenSide, tokens: TokenTable) -> Base | None:
    """Return the earlier embeddings to go on with, or None; those that were lost cannot be made again. Rank 0 only."""
    if work.job.mine.passages == "fresh":
        return None
    earlier = earlier_base(work.job.run.folder, task.version)
    if earlier is None:
        return None
    shards = open_side("passage", earlier.weights_digest, tokens).shards
    for shard in set(range(shards.num_shards)) - set(shards.missing()):
        shards.drop_torn(shard)
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
    block_rows, device = rows_of_block(num_passages), work.device
    index = job.index
    if index.factory == AUTO:
        audited = min(job.audit.num_queries, num_queries)
        load = Load(num_queries, num_passages, block_rows, width, job.search.top_k, index.nprobe, audited)
        index = replace(index, factory=ranks.decide(lambda: choose_index(job.run.folder, load, device)))
    limit = memory_limit(ranks, job.mine.memory_gib)

    def plan() -> MemoryPlan:
        sizes = Sizes(
            num_queries=num_queries,
            num_passages=num_passages,
            shard_rows=rows_of_shard(num_passages),
            block_rows=block_rows,
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
