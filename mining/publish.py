"""Versions of the negatives on disk: which number comes next, what is found before one is published, what a manifest says, what
is deleted.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mining.assembly import assemble
from mining.job import MineJob
from mining.ranks import Ranks
from mining.table.audit import audit_scores, overlap_with, reasons_against, suspected_share
from mining.table.filters import margins_of
from mining.table.judgements import Judgements
from mining.table.kept import Drawn
from mining.watch import Task
from trainer.handoff.claim import Claim
from trainer.handoff.manifest import TornVersion, clean_staging, is_disk_error, read_latest, versions, write_latest
from trainer.handoff.negatives import Negatives, map_negatives, negatives_folder, open_negatives, version_name
from trainer.handoff.retention import prune
from trainer.handoff.weights import Checkpoint

log = logging.getLogger(__name__)


def claim_negatives(run: Path, num_queries: int, num_passages: int) -> None:
    """Clear what a killed service left half-written, and point LATEST at the last version if it had no time to."""
    folder = negatives_folder(run)
    clean_staging(folder)
    last = last_version(run, num_queries, num_passages)
    if last is not None and read_latest(folder) != version_name(last.version):
        write_latest(folder, version_name(last.version))


def next_number(run: Path, with_bm25: bool) -> int:
    """Return the number of the next version: the last one on disk plus 1; 0 is BM25's."""
    there = versions(negatives_folder(run))
    return int(there[-1].name.removeprefix("v")) + 1 if there else 0 if with_bm25 else 1


def last_version(run: Path, num_queries: int, num_passages: int) -> Negatives | None:
    """Return the last whole version, or None."""
    for folder in reversed(versions(negatives_folder(run))):
        try:
            return open_negatives(run, folder.name, num_queries, num_passages)
        except TornVersion as torn:
            log.warning("negatives passed over: %s", torn)
    return None


def open_last(ranks: Ranks, run: Path, num_queries: int, num_passages: int) -> Negatives | None:
    """Return the last whole version on every rank, or None; rank 0 alone verifies it. Collective."""

    def find() -> tuple[Path, dict[str, Any]] | None:
        last = last_version(run, num_queries, num_passages)
        return None if last is None else (negatives_folder(run) / version_name(last.version), last.manifest)

    found = ranks.decide(find)
    return None if found is None else ranks.together(lambda: map_negatives(*found))


def stays(ranks: Ranks, job: MineJob, task: Task, num_queries: int, num_passages: int) -> Negatives | None:
    """Return the version whose negatives stay in this one until they are easy, on every rank, or None. Collective.

    Scores of BM25 compare with none.
    """
    if job.sample.replace == "all":
        return None
    last = open_last(ranks, job.run.folder, num_queries, num_passages)
    source = "bm25" if task.checkpoint is None else "model"
    return last if last is not None and last.version < task.version and last.manifest["source"] == source else None


def audit_drawn(ranks: Ranks, job: MineJob, judgements: Judgements, drawn: Drawn, recall: float | None) -> dict[str, Any]:
    """Return what is known of a version before it is published, on every rank; "reasons": why it must not be. Collective.

    recall: of the index, audited; None: there was no index.
    """
    last = open_last(ranks, job.run.folder, judgements.num_queries, len(judgements.allowed_N))
    suspected = suspected_share(drawn.counts["candidates"], drawn.dropped)
    without = drawn.counts["queries_without"] / judgements.num_queries
    return {
        "recall": recall,
        "num_queries": min(job.audit.num_queries, judgements.num_queries),
        "jaccard_with_last": overlap_with(ranks, last, drawn),
        "share_suspected_false": suspected,
        "share_queries_without": round(without, 4),
        **audit_scores(ranks, judgements, drawn),
        "gate": {name: getattr(job.audit, name) for name in ("min_recall", "max_suspected", "max_without")},
        "reasons": reasons_against(job.audit, job.index.factory, recall, suspected, without),
    }


def describe_version(job: MineJob, checkpoint: Checkpoint | None, judgements: Judgements, drawn: Drawn) -> dict[str, Any]:
    """Return what a manifest says of where a version came from and how it was drawn; checkpoint None: BM25."""
    return {
        "source": "bm25" if checkpoint is None else "model",
        "checkpoint_step": None if checkpoint is None else checkpoint.step,
        "weights_digest": None if checkpoint is None else checkpoint.manifest["weights_digest"],
        "train_split": job.data.train_split,
        "num_passages": len(judgements.allowed_N),
        "held_out": judgements.num_held_out,
        "num_negatives": drawn.sizes["ids"],
        "num_empty_rows": drawn.num_empty,
        "index": {"factory": "bm25"} if checkpoint is None else asdict(job.index),
        "search": {"top_k": job.mine.bm25_top_k} if checkpoint is None else asdict(job.search),
        "filter": {**asdict(job.filter), "dropped": drawn.dropped},
        "rerank": asdict(job.rerank) if job.rerank.model else None,
        "margins": None if checkpoint is None else asdict(margins_of(job.filter, job.rerank.margin)),
        "sample": {**asdict(job.sample), "seed": job.run.seed},
        "counts": drawn.counts,
    }


def publish(
    ranks: Ranks,
    job: MineJob,
    claim: Claim,
    version: int,
    drawn: Drawn,
    fields: dict[str, Any],
    clusters: np.ndarray | None = None,
) -> dict[str, Any]:
    """Publish a version, prune old ones, and return its manifest, on every rank. Collective.

    claim: of the run; raises RunInUse if another service has taken this one's place.
    fields: of the manifest: what `describe_version` and `audit_drawn` found, wall time by phase, and more.
    clusters: on rank 0, of each query; None: none.
    """
    manifest = assemble(ranks, job.run.folder, version, drawn, fields, claim.check, clusters)
    ranks.on_first(lambda: prune_versions(job))
    return manifest


def prune_versions(job: MineJob) -> None:
    """Delete the versions beyond mine.keep_versions, which may wait where the disk refuses. Rank 0 only."""
    try:
        if not job.negatives.schedule:  # with a schedule a trainer that starts again may need any of them
            prune(negatives_folder(job.run.folder), job.mine.keep_versions)
    except Exception as error:
        if not is_disk_error(error):
            raise
        log.warning("old versions stay until the next is published: %s", error)
