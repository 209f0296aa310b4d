"""Builds an index over all passages whose recall is high enough, or falls back to exact search."""

import logging
from dataclasses import dataclass, replace

from mining.find.centroids import Centroids
from mining.find.embeddings import Embeddings, rows_of_block
from mining.find.index import ShardIndex, build_indexes
from mining.find.source import Encoded
from mining.settings import AUTO, EXACT, IndexSettings
from mining.table.audit import audit_recall, audit_sample
from mining.watch import Task
from mining.work import Work

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Indexed:
    """The indexes of this rank's shards."""

    indexes: list[ShardIndex]
    settings: IndexSettings
    recall: float  # audited; 1: exact
    centroids: Centroids
    trained_in: int | None  # version whose centroids they have; None: no index

    def about(self) -> dict[str, object]:
        """Return what a manifest says of it."""
        return {"factory": self.settings.factory, "nprobe": self.settings.nprobe, "centroids_of_version": self.trained_in}


def index_passages(work: Work, task: Task, encoded: Encoded) -> Indexed:
    """Return an index whose audited recall is at least audit.min_recall, or the last one tried.

    Tried are the centroids of an earlier version, then new ones, then exact search if the index was chosen by "auto".
    Collective; raises InputError and Stopped on all.
    """
    job, tables = work.job, (encoded.queries, encoded.passages)
    # Verified on all ranks, where a torn one is everyone's: positives may be in any shard.
    work.ranks.together(lambda: [table.shard(i) for table in tables for i in range(table.shards.num_shards)])
    block_rows = rows_of_block(encoded.passages.shards.num_rows)
    for starts_anew in (False, True):
        centroids = Centroids(job.run.folder, task.version, encoded.index.factory, block_rows, starts_anew)
        found = _index(work, task, encoded, encoded.index, centroids)
        if found.recall >= job.audit.min_recall:
            return found
        if centroids.source is None:
            break
        log.warning(
            "%s with centroids of version %d finds %.3f of the exact neighbours: they are trained anew",
            encoded.index.factory,
            centroids.source,
            found.recall,
        )
    if job.index.factory == AUTO:
        log.warning("%s finds %.3f of the exact neighbours: the search is exact", encoded.index.factory, found.recall)
        return _index(work, task, encoded, replace(encoded.index, factory=EXACT), centroids)
    return found


def _index(work: Work, task: Task, encoded: Encoded, settings: IndexSettings, centroids: Centroids) -> Indexed:
    job, ranks, k = work.job, work.ranks, work.job.search.top_k
    with work.phase("indexing"):
        indexes = build(work, settings, encoded.passages, centroids)
    if settings.factory == EXACT:
        return Indexed(indexes, settings, 1.0, centroids, None)
    with work.phase("auditing"):
        places = audit_sample(job.audit, job.run.seed, task.version, work.judgements.query_rows)
        exact = build(work, replace(settings, factory=EXACT), encoded.passages, centroids)
        recall = audit_recall(ranks, indexes, exact, encoded.queries.read(places), k)
    trained_in = task.version if centroids.source is None else centroids.source
    return Indexed(indexes, settings, recall, centroids, trained_in)


def build(work: Work, settings: IndexSettings, passages: Embeddings, centroids: Centroids) -> list[ShardIndex]:
    """Return the indexes of this rank's shards. Collective: an error of one is an error of all."""
    blocks = range(work.ranks.rank, passages.num_blocks, work.ranks.num_ranks)
    allowed_N, k = work.judgements.allowed_N, work.job.search.top_k
    return work.ranks.together(lambda: build_indexes(settings, passages, blocks, allowed_N, work.device, k, centroids))
