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
from mining.find.dense import DenseSearch
from mining.find.embeddings import encode_together
from mining.find.pairs import known_before, list_together
from mining.find.source import Source, hold_to_drift, may_have_drifted, open_encoder, open_supplied, settle_source
from mining.find.supplied import VECTORS
from mining.publish import audit_drawn, describe_version, publish, stays
from mining.ranks import Refused
from mining.table.audit import reasons_against, reasons_of_collapse
from mining.table.clusters import cluster_queries, describe_clusters
from mining.table.doubts import doubts, last_suspected, random_score
from mining.table.draw import Draw
from mining.table.filters import Keys
from mining.table.kept import Drawn, KeptTiles
from mining.table.tiles import draw_tiles, tiles_of
from mining.watch import Task
from mining.work import ENCODING, Work
from trainer.handoff.weights import Checkpoint

log = logging.getLogger(__name__)


def mine_bm25(work: Work, task: Task) -> None:
    """Publish a version from BM25, before there is any model. Collective; raises Stopped on all."""
    ranks, job, judgements = work.ranks, work.job, work.judgements
    draw, kept, todo = open_draw(work, task, ())
    with work.phase("searching with BM25", queries=judgements.num_queries):
        words = BM25Retriever(ranks, judgements, work.data, job.mine.bm25_top_k)
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
        with work.phase("searching with BM25", queries=num_queries):
            retriever = BM25Retriever(ranks, work.judgements, work.data, job.search.bm25_top_k)
            words = list_together(ranks, lambda tile: retriever.find(tile)[1], num_queries, source.plan.query_tile)
    pairs = known_before(work.judgements, job.sample, job.run.seed, task.version, draw.last, words)
    search = DenseSearch(work, source, pairs, words, todo)
    index = open_index(work, task, search)
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
            tiles = tiles_of(todo, source.plan.query_tile, places)
            draw_tiles(draw, ranks, retriever, kept, tiles, work.progress)
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
