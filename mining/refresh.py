"""How one version of the negatives is made, from its first phase to its last: every phase is opened here, in order.

Queries are encoded first. Then the passages pass by in one stream: while a shard is on the device that has encoded it, it is
searched, and the pairs that are known before are scored. A service that was killed goes on from the shards and the drawn parts
on disk, with any number of ranks. Recall is audited before the negatives are drawn, so that a bad index costs a sample and not a
refresh.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from mining.find.dense import DenseSearch
from mining.find.embeddings import encode_together
from mining.find.pairs import Listed, known_before, list_together
from mining.find.source import Source, hold_to_drift, may_have_drifted, open_encoder, open_supplied, settle_source
from mining.find.supplied import VECTORS
from mining.publish import publish_drawn, stays
from mining.ranks import Refused
from mining.table.audit import reasons_against, reasons_of_collapse
from mining.table.clusters import cluster_queries
from mining.table.doubts import random_score
from mining.table.draw import Draw
from mining.table.filters import Keys
from mining.table.kept import KeptTiles
from mining.table.tiles import draw_negatives
from mining.watch import Task
from mining.work import ENCODING, Work
from trainer.handoff.weights import Checkpoint

log = logging.getLogger(__name__)


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
    draw, kept = open_draw(work, task, source.keys)
    todo = ranks.decide(lambda: kept.missing(num_queries))
    words = None
    if job.search.bm25_top_k and todo:
        with work.phase("searching with BM25", queries=num_queries):
            words = ...
    pairs = known_before(work.judgements, job.sample, job.run.seed, task.version, draw.last, words)
    search = DenseSearch(work, source, pairs, words, todo)
    ...
