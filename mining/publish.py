"""Versions of the negatives on disk: which number comes next, what a manifest says, what is deleted. Rank 0 only."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mining.job import MineJob
from mining.table.audit import overlap_with, reasons_against, score_quantiles, suspected_share
from mining.table.clusters import describe_clusters
from mining.table.draw import Drawn
from mining.table.filters import margins_of
from mining.table.judgements import Judgements
from trainer.handoff.claim import Claim
from trainer.handoff.manifest import TornVersion, clean_staging, is_disk_error, read_latest, versions, write_latest
from trainer.handoff.negatives import Negatives, negatives_folder, open_negatives, publish_negatives, version_name
from trainer.handoff.retention import prune
from trainer.handoff.retry import patiently
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


def stays(job: MineJob, version: int, source: str, num_queries: int, num_passages: int) -> Negatives | None:
    """Return the version whose negatives stay in this one until they are easy, or None: scores of BM25 compare with none."""
    if job.sample.replace == "all":
        return None
    last = last_version(job.run.folder, num_queries, num_passages)
    return last if last is not None and last.version < version and last.manifest["source"] == source else None


def publish(
    job: MineJob,
    claim: Claim,
    version: int,
    checkpoint: Checkpoint | None,
    judgements: Judgements,
    drawn: Drawn,
    data_digest: str,
    clusters: np.ndarray | None,
    audit: dict[str, Any],
    seconds: dict[str, float],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Publish a version, prune old ones, and return its manifest.

    claim: of the run; raises RunInUse if another service has taken this one's place.
    checkpoint: where it came from; None: BM25.
    audit: what `audit_drawn` found.
    seconds: wall time by phase.
    about: more fields of the manifest; they take precedence.
    """
    run, num_passages = job.run.folder, len(judgements.allowed_N)
    fields = {
        "source": "bm25" if checkpoint is None else "model",
        "checkpoint_step": None if checkpoint is None else checkpoint.step,
        "weights_digest": None if checkpoint is None else checkpoint.manifest["weights_digest"],
        "data_digest": data_digest,
        "train_split": job.data.train_split,
        "num_passages": num_passages,
        "held_out": judgements.num_held_out,
        "num_negatives": len(drawn.ids),
        "num_empty_rows": int((drawn.indptr[1:] == drawn.indptr[:-1]).sum()),
        "index": {"factory": "bm25"} if checkpoint is None else asdict(job.index),
        "search": {"top_k": job.mine.bm25_top_k} if checkpoint is None else asdict(job.search),
        "filter": {**asdict(job.filter), "dropped": drawn.dropped},
        "rerank": asdict(job.rerank) if job.rerank.model else None,
        "margins": None if checkpoint is None else asdict(margins_of(job.filter, job.rerank.margin)),
        "sample": {**asdict(job.sample), "seed": job.run.seed},
        "clusters": describe_clusters(job.clusters, clusters),
        "counts": drawn.counts,
        "audit": audit,
        "seconds": seconds,
        **about,
    }
    columns = drawn.indptr, drawn.ids, drawn.scores
    manifest = patiently(
        lambda: publish_negatives(run, version, *columns, fields, claim.check, clusters=clusters, **drawn.more),
        f"negatives v{version}",
    )
    try:
        if not job.negatives.schedule:  # with a schedule a trainer that starts again may need any of them
            prune(negatives_folder(run), job.mine.keep_versions)
    except Exception as error:
        if not is_disk_error(error):
            raise
        log.warning("old versions stay until the next is published: %s", error)
    return manifest


def audit_drawn(job: MineJob, judgements: Judgements, drawn: Drawn, recall: float | None) -> dict[str, Any]:
    """Return what is known of a version before it is published; "reasons": why it must not be.

    recall: of the index, audited; None: there was no index.
    """
    last = last_version(job.run.folder, judgements.num_queries, len(judgements.allowed_N))
    suspected = suspected_share(drawn.counts["candidates"], drawn.dropped)
    without = drawn.counts["queries_without"] / judgements.num_queries
    return {
        "recall": recall,
        "num_queries": min(job.audit.num_queries, judgements.num_queries),
        "jaccard_with_last": overlap_with(last, drawn.indptr, drawn.ids),
        "share_suspected_false": suspected,
        "share_queries_without": round(without, 4),
        "scores": score_quantiles(drawn.scores),
        "positive_scores": score_quantiles(drawn.more.get("positive_scores", np.zeros(0))),
        "gate": {name: getattr(job.audit, name) for name in ("min_recall", "max_suspected", "max_without")},
        "reasons": reasons_against(job.audit, job.index.factory, recall, suspected, without),
    }
