"""How one version of the negatives is made: encode, index, audit, search, filter, sample, audit again, publish.

Recall is audited before the search over all queries, so that a bad index costs a sample and not a refresh.
"""

import logging
from dataclasses import asdict
from typing import Any

import numpy as np

from mining.figures import version_figures
from mining.find.indexed import index_passages
from mining.find.retrieve import BM25Retriever, BothRetrievers, DenseRetriever, Retriever
from mining.find.search import QUERY_TILE
from mining.find.source import Encoded, encode_checkpoint
from mining.publish import audit_drawn, publish, stays
from mining.ranks import Refused
from mining.table.audit import reasons_against, reasons_of_collapse
from mining.table.clusters import cluster_queries
from mining.table.doubts import doubts, last_suspected, random_score
from mining.table.draw import Draw, Drawn
from mining.table.filters import Keys
from mining.table.kept import KeptTiles
from mining.table.tiles import draw_negatives
from mining.watch import Task
from mining.work import Work
from trainer.handoff.weights import Checkpoint

log = logging.getLogger(__name__)


def mine_bm25(work: Work, task: Task) -> None:
    """Publish a version from BM25, before there is any model. Collective; raises Stopped on all."""
    judgements = work.judgements
    with work.phase("searching with BM25", queries=judgements.num_queries):
        drawn = draw(work, task, (), BM25Retriever(work.ranks, judgements, work.data, work.job.mine.bm25_top_k))
    publish_drawn(work, task, drawn)


def mine_checkpoint(work: Work, task: Task, checkpoint: Checkpoint) -> None:
    """Publish a version from a checkpoint, or refuse it for what the audit found. Collective; raises Stopped on all."""
    job, ranks, judgements = work.job, work.ranks, work.judgements
    encoded = encode_checkpoint(work, task, checkpoint)
    queries, passages = encoded.queries, encoded.passages
    at_random = ranks.decide(lambda: score_of_random(_some_embeddings(encoded)))
    indexed = index_passages(work, task, encoded)
    ranks.decide(lambda: refuse(reasons_against(job.audit, indexed.settings.factory, indexed.recall)))
    dense = DenseRetriever(ranks, judgements, queries, passages, indexed.indexes, job.search.top_k)
    words = BM25Retriever(ranks, judgements, work.data, job.search.bm25_top_k)
    retriever = BothRetrievers(dense, words) if job.search.bm25_top_k else dense
    with work.phase("searching", queries=judgements.num_queries):
        drawn = draw(work, task, encoded.keys, retriever, encoded.plan.query_tile)
    clusters = None
    if job.clusters.num:
        with work.phase("clustering"):
            chance = job.run.seed, task.version
            clusters = ranks.on_first(lambda: cluster_queries(job.clusters, *chance, judgements, queries, passages))
    about = {
        "index": indexed.about(),
        "encode": job.encode.numbers,
        "passages": encoded.about_passages,
        "memory": encoded.plan.as_json(),
        "random_score": at_random,
    }
    publish_drawn(work, task, drawn, indexed.recall, clusters, about)
    if ranks.speaks:
        indexed.centroids.prune()


def score_of_random(sides: dict[str, np.ndarray]) -> float | None:
    """Return what queries and passages score that belong together by chance only; raise Refused for a collapsed model."""
    refuse(reasons_of_collapse(sides))
    return random_score(sides["queries"], sides["passages"])


def _some_embeddings(encoded: Encoded) -> dict[str, np.ndarray]:
    """Return some embeddings of queries and of passages, of different inputs as far as these are known."""
    found = {"queries": encoded.queries.first(), "passages": encoded.passages.first()}
    for keys in encoded.keys[:1]:
        of_side = {"queries": keys.query_Q, "passages": keys.passage_N}
        found = {side: rows[np.unique(of_side[side][: len(rows)], return_index=True)[1]] for side, rows in found.items()}
    return found


def draw(
    work: Work, task: Task, token_keys: tuple[Keys, ...], retriever: Retriever, query_tile: int = QUERY_TILE
) -> Drawn | None:
    """Return the negatives of all queries on rank 0: search, filter, sample. Collective.

    token_keys: of what the encoder reads, where there is one: texts that it cannot tell apart are equal, too.
    """
    job, judgements, text_keys = work.job, work.judgements, work.data.text_keys
    keys = Keys(text_keys["queries"][judgements.query_rows], text_keys["corpus"]), *token_keys
    sizes = judgements.num_queries, len(work.data.corpus)
    source = "bm25" if task.checkpoint is None else "model"
    last = work.ranks.together(lambda: stays(job, task.version, source, *sizes))
    settings = job.filter, job.sample, job.rerank, job.run.seed, task.version
    how = Draw(*settings, judgements, keys, work.reranker, last)
    return draw_negatives(how, work.ranks, retriever, kept_tiles(work, task), work.progress, query_tile)


def kept_tiles(work: Work, task: Task) -> KeptTiles:
    """Return where the negatives of a version are kept until it is published."""
    job, checkpoint = work.job, task.checkpoint
    sections = (job.filter, job.sample, job.rerank, job.search, job.index)
    about = {"version": task.version, "weights": checkpoint and checkpoint.manifest["weights_digest"], "data": work.data.digest}
    about |= {"seed": job.run.seed, "passages": [job.mine.passages, job.mine.max_drift], "bm25": job.mine.bm25_top_k}
    about["cross_encoder"] = work.reranker and work.reranker.digest
    return KeptTiles(job.run.folder, about | {"job": [*(asdict(section) for section in sections), job.encode.numbers]})


def publish_drawn(
    work: Work,
    task: Task,
    drawn: Drawn | None,
    recall: float | None = None,
    clusters: np.ndarray | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Publish on rank 0 and tell about it, or refuse; about: more for the manifest. Collective."""
    checkpoint = task.checkpoint

    def tell_and_publish() -> None:
        assert drawn is not None
        audit = audit_drawn(work.job, work.judgements, drawn, recall)
        refuse(audit["reasons"])
        digest, judgements, suspected_before = work.data.digest, work.judgements, last_suspected(work.job.run.folder)
        manifest = publish(
            work.job,
            work.claim,
            task.version,
            checkpoint,
            judgements,
            drawn,
            digest,
            clusters,
            audit,
            work.seconds,
            about or {},
        )
        told = ("version", "source", "num_negatives", "held_out", "counts", "clusters", "audit", "seconds")
        kept = {key: manifest[key] for key in told}
        dropped = manifest["filter"]["dropped"]
        work.status.update(**version_figures(manifest))
        step = checkpoint.step if checkpoint else 0
        for kind, sentence in doubts(manifest, suspected_before).items():
            work.warnings.tell(kind, sentence, step)
        figures = {"event": "published", **kept, "dropped": dropped, **work.ages()}
        work.metrics.record(step, figures)
        log.info(
            "negatives v%d published from %s: %d for %d queries; dropped %s; %.1f s",
            task.version, f"step {step}" if checkpoint else "BM25", len(drawn.ids),
            work.judgements.num_queries, dropped, sum(work.seconds.values()),
        )  # fmt: skip

    with work.phase("publishing"):
        work.ranks.decide(tell_and_publish)
        if work.ranks.speaks:
            kept_tiles(work, task).forget()


def refuse(reasons: list[str]) -> None:
    """Raise Refused if there are reasons not to publish a version."""
    if reasons:
        raise Refused("; ".join(reasons))
