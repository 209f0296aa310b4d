"""How one version of the negatives is made, from its first phase to its last: every phase is opened here, in order.

Queries are encoded first. Then the passages pass by in one stream: while a shard is on the device that has encoded it, it is
searched, and the pairs that are known before are scored. A service that was killed goes on from the shards and the drawn parts
on disk, with any number of ranks. Recall is audited before negatives are drawn, so that a bad index costs a sample and not a
refresh.
"""

import logging
from dataclasses import asdict
from typing import Any

import numpy as np

from mining.figures import version_figures
from mining.find.dense_search import DenseSearch
from mining.find.embeddings import encode_together
from mining.find.indexed import open_index
from mining.find.known_pairs import known_before, list_together
from mining.find.source import hold_to_drift, may_have_drifted, open_encoder, open_supplied, settle_source
from mining.find.supplied import VECTORS
from mining.find.words import index_words
from mining.memory import QUERY_TILE
from mining.publish import audit_drawn, describe_version, publish, stays
from mining.ranks import Refused
from mining.settings import EXACT
from mining.table.audit import reasons_against, reasons_of_collapse
from mining.table.clusters import cluster_queries, describe_clusters
from mining.table.doubts import doubts, last_suspected, random_score
from mining.table.filters import Keys
from mining.table.kept import KeptTiles
from mining.table.share import Draw
from mining.table.tiles import draw_tiles, tiles_of
from mining.watch import Task
from mining.work import ENCODING, Work
from trainer.handoff.weights import Checkpoint

log = logging.getLogger(__name__)


def mine_bm25(work: Work, task: Task) -> None:
    """Publish a version from BM25, before there is any model. Collective; raises Stopped on all."""
    ranks, job = work.ranks, work.job
    draw, kept, todo = open_draw(work, task, ())
    if todo:
        words = index_words(work, job.mine.bm25_top_k)
        with work.phase("searching with BM25", queries=work.judgements.num_queries):
            draw_tiles(draw, ranks, words, kept, tiles_of(todo, QUERY_TILE * ranks.num_ranks), work.progress)
    publish_drawn(work, task, kept)


def mine_checkpoint(work: Work, task: Task, checkpoint: Checkpoint) -> None:
    """Publish a version from a checkpoint, or refuse it for what the audit found. Collective; raises Stopped on all."""
    job, ranks, num_queries = work.job, work.ranks, work.judgements.num_queries
    if VECTORS in checkpoint.manifest:
        with work.phase("reading vectors"):
            source = open_supplied(work, task, checkpoint)
    else:
        with work.phase("loading"):
            source, open_side = open_encoder(work, task, checkpoint)
        if may_have_drifted(work, source, checkpoint):
            with work.phase("measuring drift"):
                source = hold_to_drift(work, task, checkpoint, source, open_side)
    ranks.decide(lambda: settle_source(work, checkpoint, source))
    if source.texts:
        with work.phase("encoding queries", tokens=source.missing_tokens("query")):
            encode_together(ranks, [source.texts["query"]], work.progress)
    draw, kept, todo = open_draw(work, task, source.keys)
    words = None
    if job.search.bm25_top_k and todo:
        by_words = index_words(work, job.search.bm25_top_k)
        with work.phase("searching with BM25", queries=num_queries):
            words = list_together(ranks, lambda tile: by_words.find(tile)[1], num_queries, source.plan.query_tile)
        del by_words  # its memory
    pairs = known_before(work.judgements, job.sample, job.run.seed, task.version, draw.last, words)
    search = DenseSearch(work, source, pairs, words, todo)
    index = None if source.index.factory == EXACT else open_index(work, task, search)
    with work.phase(ENCODING, tokens=source.missing_tokens("passage")):
        search.stream(index is None, [] if index is None else index.looks())
    at_random = ranks.decide(lambda: score_of_random(_some_embeddings(search)))
    if index is not None:
        with work.phase("indexing"):
            index.build()
        with work.phase("auditing"):
            index.audit()
        ranks.decide(lambda: refuse(reasons_against(job.audit, source.index.factory, index.recall)))
    with work.phase("searching", queries=num_queries):
        for places, retriever in search.retrievers(None if index is None else index.finder):
            draw_tiles(draw, ranks, retriever, kept, tiles_of(todo, source.plan.query_tile, places), work.progress)
            del retriever  # and the memory of its pass
    clusters = None
    if job.clusters.num:
        with work.phase("clustering"):
            chance = job.run.seed, task.version
            tables = search.queries, search.passages
            clusters = ranks.on_first(lambda: cluster_queries(job.clusters, *chance, work.judgements, *tables))
    about = {
        "index": {"factory": EXACT} if index is None else index.about(),
        "encode": job.encode.numbers,
        "passages": source.about_passages(job.mine.passages),
        "memory": source.plan.as_json(),
        "random_score": at_random,
    }
    publish_drawn(work, task, kept, 1.0 if index is None else index.recall, clusters, about)


def open_draw(work: Work, task: Task, token_keys: tuple[Keys, ...]) -> tuple[Draw, KeptTiles, list[slice]]:
    """Return how negatives are drawn, where they are kept until they are published, and the queries that have none yet.

    token_keys: of what the encoder reads, where there is one: texts that it cannot tell apart are equal, too. Collective.
    """
    job, judgements, text_keys = work.job, work.judgements, work.data.text_keys
    keys = Keys(text_keys["queries"][judgements.query_rows], text_keys["corpus"]), *token_keys
    last = stays(work.ranks, job, task, judgements.num_queries, len(work.data.corpus))
    settings = job.filter, job.sample, job.rerank, job.run.seed, task.version
    kept = kept_tiles(work, task)

    def find_missing() -> list[slice]:
        kept.open()
        return kept.missing(judgements.num_queries)

    return Draw(*settings, judgements, keys, work.reranker, last, work.device), kept, work.ranks.decide(find_missing)


def kept_tiles(work: Work, task: Task) -> KeptTiles:
    """Return where the negatives of a version are kept until it is published."""
    job, checkpoint = work.job, task.checkpoint
    sections = (job.filter, job.sample, job.rerank, job.search, job.index)
    about = {"version": task.version, "weights": checkpoint and checkpoint.manifest["weights_digest"], "data": work.data.digest}
    about |= {"seed": job.run.seed, "passages": [job.mine.passages, job.mine.max_drift], "bm25": job.mine.bm25_top_k}
    about["cross_encoder"] = work.reranker and work.reranker.digest
    return KeptTiles(job.run.folder, about | {"job": [*(asdict(section) for section in sections), job.encode.numbers]})


def score_of_random(sides: dict[str, np.ndarray]) -> float | None:
    """Return what queries and passages score that belong together by chance only; raise Refused for a collapsed model."""
    refuse(reasons_of_collapse(sides))
    return random_score(sides["queries"], sides["passages"])


def _some_embeddings(search: DenseSearch) -> dict[str, np.ndarray]:
    """Return some embeddings of queries and of passages, of different inputs as far as these are known."""
    found = {"queries": search.queries.first(), "passages": search.passages.first()}
    for keys in search.source.keys[:1]:
        of_side = {"queries": keys.query_Q, "passages": keys.passage_N}
        found = {side: rows[np.unique(of_side[side][: len(rows)], return_index=True)[1]] for side, rows in found.items()}
    return found


def publish_drawn(
    work: Work,
    task: Task,
    kept: KeptTiles,
    recall: float | None = None,
    clusters: np.ndarray | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Publish a version by all ranks and tell about it, or refuse; about: more for the manifest. Collective."""
    job, ranks, judgements = work.job, work.ranks, work.judgements
    with work.phase("publishing"):
        drawn = kept.gather(ranks, judgements.num_queries)
        suspected_before = ranks.decide(lambda: last_suspected(job.run.folder))
        audit = audit_drawn(ranks, job, judgements, drawn, recall)
        ranks.decide(lambda: refuse(audit["reasons"]))
        fields = describe_version(job, task.checkpoint, judgements, drawn)
        fields |= {"data_digest": work.data.digest, "clusters": describe_clusters(job.clusters, clusters)}
        fields |= {"audit": audit, "seconds": work.seconds, **(about or {})}
        manifest = publish(ranks, job, work.claim, task.version, drawn, fields, clusters)
        ranks.on_first(lambda: tell(work, task, manifest, suspected_before))
        ranks.on_first(kept.forget)


def tell(work: Work, task: Task, manifest: dict[str, Any], suspected_before: float | None) -> None:
    """Tell people of a version, and of what is doubtful about it. Rank 0 only."""
    told = ("version", "source", "num_negatives", "held_out", "counts", "clusters", "audit", "seconds")
    kept, dropped = {key: manifest[key] for key in told}, manifest["filter"]["dropped"]
    work.status.update(**version_figures(manifest))
    step = task.checkpoint.step if task.checkpoint else 0
    for kind, sentence in doubts(manifest, suspected_before).items():
        work.warnings.tell(kind, sentence, step)
    work.metrics.record(step, {"event": "published", **kept, "dropped": dropped, **work.ages()})
    log.info(
        "negatives v%d published from %s: %d for %d queries; dropped %s; %.1f s",
        task.version, f"step {step}" if task.checkpoint else "BM25", manifest["num_negatives"],
        manifest["num_queries"], dropped, sum(work.seconds.values()),
    )  # fmt: skip


def refuse(reasons: list[str]) -> None:
    """Raise Refused if there are reasons not to publish a version."""
    if reasons:
        raise Refused("; ".join(reasons))
