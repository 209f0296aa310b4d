"""What a version is mined with: the encoder of a checkpoint, or vectors that a person supplied; and the plans for its work."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mining.disk import plan_disk
from mining.find.base import Base, drift_sample, earlier_base, keep_base, mean_drift
from mining.find.cost import Load, choose_index
from mining.find.embeddings import Embeddings, encode_together
from mining.find.index import bytes_of_passage, num_trained
from mining.find.supplied import VECTORS, copy_vectors
from mining.memory import MemoryPlan, Sizes, device_limit, held_now, memory_limit, plan_memory
from mining.settings import AUTO, IndexSettings
from mining.table.clusters import num_clustered
from mining.table.filters import Keys
from mining.watch import Task
from mining.work import Work
from trainer.encoder.missing import Texts
from trainer.encoder.shards import Shards, open_shards, rows_of_shard
from trainer.encoder.tokens import TokenTable
from trainer.encoder.towers import Encoder
from trainer.encoder.towers import Side as Tower
from trainer.handoff.weights import ENCODER, Checkpoint, open_checkpoint

log = logging.getLogger(__name__)

OpenSide = Callable[[Tower, str, TokenTable], Texts]  # tower, digest of its weights, tokens


@dataclass(frozen=True)
class Source:
    """Queries and passages of a version: where their embeddings are, or will be, and how they come there."""

    queries: Shards
    passages: Shards
    texts: dict[str, Texts]  # by side, what encodes them; none where vectors were supplied
    keys: tuple[Keys, ...]  # of the tokens; none where vectors were supplied
    width: int  # of an embedding
    index: IndexSettings  # "auto" resolved
    plan: MemoryPlan
    base: Base  # whose embeddings of passages these are
    drift: float | None = None

    def about_passages(self, job_passages: str) -> dict[str, Any]:
        """Return what a manifest says of the passages' embeddings."""
        about = {"mode": job_passages, "weights_digest": self.base.weights_digest, "checkpoint_step": self.base.checkpoint_step}
        return about | {"drift": None if self.drift is None else round(self.drift, 6)}

    def missing_tokens(self, side: str) -> int:
        """Return how many tokens of a side are to be encoded."""
        texts = self.texts.get(side)
        if texts is None:
            return 0
        return sum(int(texts.tokens.lengths[texts.shards.rows(shard)].sum()) for shard in texts.shards.missing())


def open_supplied(work: Work, task: Task, checkpoint: Checkpoint) -> Source:
    """Return what a person supplied in the place of an encoder. Collective; raises InputError and Stopped on all."""
    digest = checkpoint.manifest["weights_digest"]
    queries, passages = copy_vectors(work, Path(checkpoint.manifest[VECTORS]), digest)
    index, plan = _plan(work, passages.width, token_width=0)
    base = Base(task.version, digest, checkpoint.step)
    return Source(queries.shards, passages.shards, {}, (), passages.width, index, plan, base)


def open_encoder(work: Work, task: Task, checkpoint: Checkpoint) -> tuple[Source, OpenSide]:
    """Return what a checkpoint encodes, and what opens either side under any weights. Collective; raises as `open_supplied`."""
    job, ranks = work.job, work.ranks
    encoder, pooling, (queries, passages) = ranks.together(lambda: _read_encoder(work, checkpoint))
    config = encoder.side("passage").model.config
    held_by_token = 8 * config.hidden_size + 3 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    encoder.to(work.device)
    index, plan = _plan(work, encoder.width, held_by_token)

    def open_side(tower: Tower, digest: str, tokens: TokenTable) -> Texts:
        pins = work.pins if ranks.speaks else None
        shards = open_shards(job.run.folder / "shards", digest, pooling, tokens, encoder, tower, job.encode, pins)
        return Texts(shards, encoder.side(tower), tokens)

    digest = checkpoint.manifest["weights_digest"]
    earlier = ranks.decide(lambda: _usable_base(work, task, open_side, passages))
    base = Base(task.version, digest, checkpoint.step) if earlier is None else replace(earlier, version=task.version)
    texts = {"query": open_side("query", digest, queries), "passage": open_side("passage", base.weights_digest, passages)}
    keys = (Keys(queries.key_of_row, passages.key_of_row),)
    return Source(texts["query"].shards, texts["passage"].shards, texts, keys, encoder.width, index, plan, base), open_side


def may_have_drifted(work: Work, source: Source, checkpoint: Checkpoint) -> bool:
    """Tell whether embeddings of an earlier checkpoint are kept only while the passages have not moved."""
    return work.job.mine.passages == "drift" and source.base.weights_digest != checkpoint.manifest["weights_digest"]


def hold_to_drift(work: Work, task: Task, checkpoint: Checkpoint, source: Source, open_side: OpenSide) -> Source:
    """Return the source with the passages of the earlier checkpoint, or those of this one if they have moved. Collective."""
    rows = drift_sample(len(work.data.corpus), work.job.run.seed)
    passages, digest = source.texts["passage"], checkpoint.manifest["weights_digest"]
    sample = open_side("passage", digest, passages.tokens.select(rows))
    encode_together(work.ranks, [sample], work.progress)
    old, new = Embeddings(passages.shards), Embeddings(sample.shards)
    drift = work.ranks.decide(lambda: mean_drift(old.read(rows), new.read(np.arange(len(rows)))))
    log.info("drift of %d passages since step %d: %.5f", len(rows), source.base.checkpoint_step, drift)
    if drift <= work.job.mine.max_drift:
        return replace(source, drift=drift)
    fresh = open_side("passage", digest, passages.tokens)
    base = Base(task.version, digest, checkpoint.step)
    return replace(source, passages=fresh.shards, texts={**source.texts, "passage": fresh}, base=base, drift=drift)


def settle_source(work: Work, checkpoint: Checkpoint, source: Source) -> None:
    """Write down whose passages are taken, and refuse what the disk cannot hold. Rank 0 only; raises InputError."""
    job = work.job
    stays = None if job.mine.passages == "fresh" else source.passages.folder.name
    keep_base(job.run.folder, replace(source.base, folder=stays))
    num_missing = sum(len(side.rows(shard)) for side in (source.queries, source.passages) for shard in side.missing())
    sizes = work.judgements.num_queries, len(work.data.corpus), source.width, num_missing
    disk, work.has_fit = plan_disk(job, *sizes, starts=not work.has_fit), True
    work.metrics.record(checkpoint.step, {"event": "planned disk", **disk.as_json()})


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
    index = job.index
    if index.factory == AUTO:
        audited = min(job.audit.num_queries, num_queries)
        sizes = num_queries, num_passages, width, job.search.top_k
        load = Load(*sizes, index.nprobe, audited, ranks.num_ranks, job.audit.min_recall)
        index = replace(index, factory=ranks.decide(lambda: choose_index(job.run.folder, load, work.device)))
    limit = memory_limit(ranks, job.mine.memory_gib)

    def plan() -> MemoryPlan:
        sizes = Sizes(
            num_queries=num_queries,
            num_passages=num_passages,
            shard_rows=rows_of_shard(num_passages),
            width=width,
            stored_bytes=np.dtype(job.encode.stored_type).itemsize,
            token_width=token_width,
            top_k=job.search.top_k,
            num_candidates=job.num_candidates,
            num_known=job.num_known(num_queries, len(work.judgements.positive_rows)),
            num_clustered=num_clustered(job.clusters, num_queries),
            num_ranks=ranks.num_ranks,
            index_bytes=bytes_of_passage(index.factory, width),
            num_trained=num_trained(index.factory, num_passages) if ranks.speaks else 0,
            device_type=work.device.type,
        )
        return plan_memory(sizes, held_now(), limit, device_limit(work.device))

    # Ranks hold different amounts; what they do together must be of one size.
    own = ranks.together(plan)
    query_pass, query_tile = (min(ranks.exchange([size] * ranks.num_ranks)) for size in (own.query_pass, own.query_tile))
    log.info("%s", own.as_text())
    work.metrics.record(0, {"event": "planned", "index": index.factory, **own.as_json()})
    return index, replace(own, query_pass=query_pass, query_tile=query_tile)
