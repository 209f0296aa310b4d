"""The run's disk: a budget for what a service keeps there, held to by deleting what is older, and refused where it cannot hold.

At once are there: the embeddings of two refreshes, one that was mined and one that is encoded, or as many as mine.keep_encodings
names; the versions that are kept, a version that is staged, and the parts that it is made of. Checkpoints are the trainer's.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mining.job import ALL_ENCODINGS, MineJob
from mining.memory import GIB
from trainer.encoder.shards import prune_shards
from trainer.errors import InputError, MachineFailed
from trainer.handoff.negatives import TYPES, negatives_folder

log = logging.getLogger(__name__)

SETS = 2  # of embeddings that a refresh makes: of queries and of passages


@dataclass(frozen=True)
class DiskPlan:
    """Bytes on the disk that holds the run's embeddings."""

    embeddings: int  # of all refreshes that are there at once
    versions: int  # of negatives, all that are kept
    at_work: int  # a version that is staged, and the parts that it is made of
    there: int  # of all these
    to_write: int  # by this refresh
    free: int

    @property
    def needed(self) -> int:
        return self.embeddings + self.versions + self.at_work

    @property
    def fits(self) -> bool:
        return self.needed <= self.there + self.free

    def as_text(self) -> str:
        return (
            f"disk of the run: {in_gib(self.needed)} are needed ({in_gib(self.embeddings)} for embeddings, "
            f"{in_gib(self.versions)} for negatives that are kept, {in_gib(self.at_work)} for those at work), "
            f"{in_gib(self.there)} of them are there, and {in_gib(self.free)} are free; "
            f"this refresh writes {in_gib(self.to_write)}"
        )

    def as_json(self) -> dict[str, float]:
        """Return the plan in GiB."""
        return {f"{name}_gib": round(size / GIB, 6) for name, size in {**vars(self), "needed": self.needed}.items()}


def plan_disk(job: MineJob, num_queries: int, num_passages: int, width: int, num_missing: int, starts: bool = True) -> DiskPlan:
    """Delete embeddings beyond the budget, and return what a service needs of the disk; rank 0 only, with the embeddings of the
    refresh at hand pinned.

    num_missing: texts that are to be encoded.
    starts: a person starts the service. Raises InputError then if the disk cannot hold what is needed, MachineFailed later: a
    service waits for room.
    """
    row_bytes = width * np.dtype(job.encode.stored_type).itemsize
    of_refresh, missing = (num_queries + num_passages) * row_bytes, num_missing * row_bytes
    embeddings, versions, at_work = budget(job, num_queries, num_passages, width)
    shards, own = job.run.folder / "shards", of_refresh - missing
    _prune(shards, max(SETS * refreshes_kept(job), job.mine.keep_encodings))
    there = own + min(embeddings - of_refresh, max(0, sum(_set_bytes(shards)) - own))
    there += min(versions, sum(file.stat().st_size for file in negatives_folder(job.run.folder).glob("v*/*.npy")))
    free = free_bytes(shards if shards.is_dir() else job.run.folder)
    plan = DiskPlan(embeddings, versions, at_work, there, missing + at_work, free)
    if plan.fits:
        log.info("%s", plan.as_text())
        return plan
    sentence = (
        f"{plan.as_text()}; free {in_gib(plan.needed - plan.there - plan.free)} or more, set encode.stored=fp16, "
        "mine.keep_encodings or mine.keep_versions lower, or run.folder to another disk"
    )
    raise InputError(sentence) if starts else MachineFailed(sentence)


def budget(job: MineJob, num_queries: int, num_passages: int, width: int) -> tuple[int, int, int]:
    """Return the bytes of the embeddings that are there at once, of the versions that are kept, and of one at work."""
    embeddings = refreshes_kept(job) * (num_queries + num_passages) * width * np.dtype(job.encode.stored_type).itemsize
    version = version_bytes(job, num_queries)
    num_versions = len(job.negatives.schedule) + 1 if job.negatives.schedule else job.mine.keep_versions
    return embeddings, num_versions * version, 2 * version


def refreshes_kept(job: MineJob) -> int:
    """Return how many refreshes' embeddings are there at once; one for `negpool mine --model`, whose shards others keep."""
    return 1 if job.mine.keep_encodings == ALL_ENCODINGS else max(2, -(-job.mine.keep_encodings // SETS))


def version_bytes(job: MineJob, num_queries: int) -> int:
    """Return the bytes of a version in which each query has all its negatives and one positive."""
    size = {name: np.dtype(kind).itemsize for name, kind in TYPES.items()}
    of_negative = ["ids", "scores"]
    of_query = ["indptr", "positive_scores", *(["clusters"] if job.clusters.num else [])]
    if job.sample.replace == "easy":
        of_negative.append("first_scores")
    if job.rerank.model:
        of_negative.append("teacher_scores")
        of_query.append("positive_teacher_scores")
    per_query = job.sample.num_negatives * sum(size[name] for name in of_negative) + sum(size[name] for name in of_query)
    return num_queries * per_query


def free_bytes(folder: Path) -> int:
    """Return the room left on a folder's disk."""
    return shutil.disk_usage(folder).free


def in_gib(size: int) -> str:
    """Return a size for people, never 0.00 where there is something."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 or size == 0 else f"{size / 2**20:.2f} MiB"


def _prune(shards: Path, keep: int) -> None:
    try:
        prune_shards(shards, keep)
    except (InputError, MachineFailed, OSError) as error:
        log.warning("old embeddings stay for now: %s", error)


def _set_bytes(shards: Path) -> Iterator[int]:
    """Yield the bytes of each set of embeddings: all shards but the last are alike, so one is looked at."""
    for folder in shards.iterdir() if shards.is_dir() else ():
        names = [name for name in os.listdir(folder) if name.startswith("shard-")] if folder.is_dir() else []
        if names:
            first = folder / min(names) / "embeddings.npy"
            yield len(names) * first.stat().st_size if first.is_file() else 0
