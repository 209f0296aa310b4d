"""Computes how much of the run's disk a service needs, before it writes."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mining.job import ALL_ENCODINGS, MineJob
from mining.memory import GIB

log = logging.getLogger(__name__)

NEGATIVE_BYTES = 20  # of a version: id, score, and the scores that samplers and a cross-encoder add


@dataclass(frozen=True)
class DiskPlan:
    """Bytes on the disk that holds the run."""

    embeddings: int  # of all that is kept at once: two refreshes or more
    versions: int  # of negatives, all that are kept
    to_write: int  # by this refresh: what is not encoded yet, and a version
    free: int

    def as_text(self) -> str:
        return (
            f"disk of the run: {self.embeddings / GIB:.2f} GiB for embeddings and {self.versions / GIB:.2f} GiB for negatives; "
            f"this refresh writes {self.to_write / GIB:.2f} GiB, and {self.free / GIB:.2f} GiB are free"
        )

    def as_json(self) -> dict[str, float]:
        """Return the plan in GiB."""
        return {f"{name}_gib": round(size / GIB, 4) for name, size in vars(self).items()}


def plan_disk(job: MineJob, num_queries: int, num_passages: int, width: int, num_missing: int) -> DiskPlan:
    """Return how much disk a service needs, and warn if there is too little for this refresh.

    num_missing: texts that are to be encoded.
    """
    row_bytes = width * np.dtype(job.encode.stored_type).itemsize
    version = num_queries * (job.sample.num_negatives * NEGATIVE_BYTES + 8)
    # One is read while the next one is encoded, but for the one of `negpool mine --model`.
    num_refreshes = 1 if job.mine.keep_encodings == ALL_ENCODINGS else max(2, -(-job.mine.keep_encodings // 2))
    plan = DiskPlan(
        embeddings=num_refreshes * (num_queries + num_passages) * row_bytes,
        versions=(job.mine.keep_versions + 1) * version,
        to_write=num_missing * row_bytes + version,
        free=free_bytes(job.run.folder),
    )
    if plan.to_write > plan.free:
        log.warning(
            "%s; free some, set encode.stored or mine.keep_encodings lower, or run.folder to another disk", plan.as_text()
        )
    else:
        log.info("%s", plan.as_text())
    return plan


def free_bytes(folder: Path) -> int:
    """Return the room left on a folder's disk."""
    return shutil.disk_usage(folder).free
