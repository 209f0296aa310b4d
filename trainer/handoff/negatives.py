"""The table of hard negatives that the miner publishes and the trainer maps.

A version is a CSR table of three arrays. Row q belongs to the q-th query of `queries.jsonl` that has a training
positive; ids are row numbers of `corpus.jsonl`. Rows may have different lengths, zero included. The arrays are opened
memory-mapped and never unpickled.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.handoff.manifest import TornVersion, open_version, publish_version, write_latest


@dataclass(frozen=True)
class Negatives:
    """One version of the negatives."""

    indptr: np.ndarray  # (num_queries + 1,) int64: row q is ids[indptr[q]:indptr[q + 1]]
    ids: np.ndarray  # (num_negatives,) int64 corpus rows
    scores: np.ndarray  # (num_negatives,) float32, the miner's score of each
    version: int
    manifest: dict[str, Any]

    @property
    def num_queries(self) -> int:
        return len(self.indptr) - 1

    @property
    def checkpoint_step(self) -> int | None:
        """Step of the checkpoint that these negatives were mined from; None for BM25."""
        return self.manifest.get("checkpoint_step")


@dataclass(frozen=True)
class ScheduleEntry:
    """One fixed swap: negatives of the checkpoint at one step come into force at another."""

    checkpoint: int  # step of the checkpoint to mine
    step: int  # first step that uses the negatives mined from it


def negatives_folder(run: Path) -> Path:
    return run / "negatives"


def version_name(version: int) -> str:
    return f"v{version:06d}"


def publish_negatives(
    run: Path, version: int, indptr: np.ndarray, ids: np.ndarray, scores: np.ndarray, fields: dict[str, Any]
) -> dict[str, Any]:
    """Publish a version whole, point LATEST at it and return its manifest.

    fields: what the manifest says of their origin: checkpoint_step (None for BM25), data digest, settings, counters, …
    """

    def write(folder: Path) -> None:
        np.save(folder / "indptr.npy", np.asarray(indptr, np.int64), allow_pickle=False)
        np.save(folder / "ids.npy", np.asarray(ids, np.int64), allow_pickle=False)
        np.save(folder / "scores.npy", np.asarray(scores, np.float32), allow_pickle=False)

    folder = negatives_folder(run) / version_name(version)
    manifest = publish_version(folder, write, {"version": version, "num_queries": len(indptr) - 1, **fields})
    write_latest(folder.parent, folder.name)
    return manifest


def open_negatives(run: Path, name: str, num_queries: int, num_passages: int) -> Negatives:
    """Return a verified, memory-mapped version of the negatives.

    Raises TornVersion if a file is missing, altered, or does not fit `num_queries` and `num_passages`.
    """
    folder = negatives_folder(run) / name
    manifest = open_version(folder)
    try:
        indptr, ids, scores = (
            np.load(folder / f"{part}.npy", mmap_mode="r", allow_pickle=False) for part in ("indptr", "ids", "scores")
        )
    except (OSError, ValueError) as error:
        raise TornVersion(f"{folder} cannot be read: {error}") from error
    fits = len(indptr) == num_queries + 1 and indptr[0] == 0 and indptr[-1] == len(ids) == len(scores)
    if not fits or np.any(np.diff(indptr) < 0) or np.any(ids < 0) or np.any(ids >= num_passages):
        raise TornVersion(f"{folder} does not fit {num_queries} queries and {num_passages} passages")
    return Negatives(indptr, ids, scores, int(manifest["version"]), manifest)
