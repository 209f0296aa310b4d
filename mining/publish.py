"""Versions of the negatives on disk: which number comes next, what a manifest says, what is deleted. Rank 0 only."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mining.audit import overlap_with, score_quantiles, suspected_share
from mining.job import MineJob
from mining.judgements import Judgements
from mining.refresh import Drawn
from trainer.encoder.shards import prune_shards
from trainer.handoff.manifest import TornVersion, clean_staging, prune, read_latest, versions, write_latest
from trainer.handoff.negatives import Negatives, negatives_folder, open_negatives, publish_negatives, version_name
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


def publish(
    job: MineJob,
    version: int,
    checkpoint: Checkpoint | None,
    judgements: Judgements,
    drawn: Drawn,
    data_digest: str,
    recall: float | None,
    seconds: dict[str, float],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Publish a version, prune old ones, and return its manifest.

    checkpoint: where it came from; None: BM25.
    recall: of the index, audited; None: there was no index.
    seconds: wall time by phase.
    about: more fields of the manifest; they take precedence.
    """
    run, num_passages = job.run.folder, len(judgements.allowed_N)
    last = last_version(run, judgements.num_queries, num_passages)
    audit = {
        "recall": recall,
        "num_queries": min(job.audit.num_queries, judgements.num_queries),
        "jaccard_with_last": overlap_with(last, drawn.indptr, drawn.ids),
        "share_suspected_false": suspected_share(drawn.num_candidates, drawn.dropped),
        "scores": score_quantiles(drawn.scores),
    }
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
        "search": {"top_k": job.mine.bm25_top_k if checkpoint is None else job.search.top_k},
        "filter": {**asdict(job.filter), "num_candidates": drawn.num_candidates, "dropped": drawn.dropped},
        "sample": {**asdict(job.sample), "seed": job.run.seed},
        "audit": audit,
        "seconds": seconds,
        **about,
    }
    manifest = publish_negatives(run, version, drawn.indptr, drawn.ids, drawn.scores, fields)
    _prune(job)
    return manifest


def _prune(job: MineJob) -> None:
    run = job.run.folder
    if not job.negatives.schedule:  # with a schedule a trainer that starts again may need any of them
        prune(negatives_folder(run), job.mine.keep_versions)
    if (run / "shards").is_dir():
        prune_shards(run / "shards", job.mine.keep_encodings)
