"""The table of hard negatives that the miner publishes and the trainer maps.

A version is a CSR table of three arrays. Row q belongs to the q-th query of `queries.jsonl` that has a training
positive; ids are row numbers of `corpus.jsonl`. Rows may have different lengths, zero included. More arrays are there where the
miner knows them or was asked for them: scores of the positives, a teacher's scores, clusters of the queries. The arrays are
opened memory-mapped and never unpickled.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainer.handoff.arrays import ArrayWriter, create_array, map_array
from trainer.handoff.manifest import TornVersion, open_version, publish_version, write_latest
from trainer.handoff.margins import Margins

BLOCK = 1 << 16  # numbers of a table that are looked at together: half a megabyte

TYPES = {
    **{name: np.int64 for name in ("indptr", "ids", "clusters")},
    **{name: np.float32 for name in ("scores", "first_scores", "positive_scores", "teacher_scores", "positive_teacher_scores")},
}


@dataclass(frozen=True)
class Negatives:
    """One version of the negatives."""

    indptr: np.ndarray  # (num_queries + 1,) int64: row q is ids[indptr[q]:indptr[q + 1]]
    ids: np.ndarray  # (num_negatives,) int64 corpus rows
    scores: np.ndarray  # (num_negatives,) float32, the miner's score of each
    version: int
    manifest: dict[str, Any]
    teacher_scores: np.ndarray | None = None  # (num_negatives,) float32, a cross-encoder's score of each
    clusters: np.ndarray | None = None  # (num_queries,) int64, the cluster of each query
    first_scores: np.ndarray | None = None  # (num_negatives,) float32, when each was first drawn; random ones inf
    # (num_positives,) float32, query by query in the order of the judgements: the miner's scores, and the cross-encoder's
    positive_scores: np.ndarray | None = None
    positive_teacher_scores: np.ndarray | None = None

    @property
    def num_queries(self) -> int:
        return len(self.indptr) - 1

    @cached_property
    def margins(self) -> Margins | None:
        """The margins that a negative must keep to the positive drawn beside it; None: it may stand beside any."""
        return Margins.of_each(self.manifest)

    def admit(self, at: np.ndarray, positive_at: np.ndarray) -> np.ndarray:
        """Tell which negatives may stand beside which positives, by where they stand in the tables; shapes broadcast."""
        if self.margins is None:
            return np.ones(np.broadcast_shapes(at.shape, positive_at.shape), bool)
        assert self.positive_scores is not None
        teacher, positive_teacher = self.teacher_scores, self.positive_teacher_scores
        teachers = (None, None) if teacher is None or positive_teacher is None else (teacher[at], positive_teacher[positive_at])
        return self.margins.admit(self.scores[at], self.positive_scores[positive_at], *teachers)

    @property
    def checkpoint_step(self) -> int | None:
        """Step of the checkpoint that these negatives were mined from; None for BM25."""
        return self.manifest.get("checkpoint_step")


def negatives_folder(run: Path) -> Path:
    return run / "negatives"


def version_name(version: int) -> str:
    return f"v{version:06d}"


def publish_negatives(
    run: Path,
    version: int,
    indptr: np.ndarray,
    ids: np.ndarray,
    scores: np.ndarray,
    fields: dict[str, Any],
    may_publish: Callable[[], None] = lambda: None,
    **more: np.ndarray | None,
) -> dict[str, Any]:
    """Publish a version whole, point LATEST at it and return its manifest.

    fields: what the manifest says of their origin: checkpoint_step (None for BM25), data digest, settings, counters, …
    may_publish: raises if this process may not write any more.
    more: the optional arrays of `Negatives`, by name.
    """
    arrays = {"indptr": indptr, "ids": ids, "scores": scores, **more}
    given = {name: array for name, array in arrays.items() if array is not None}

    def write(staging: Path) -> None:
        create_negatives(staging, {name: len(array) for name, array in given.items()})
        with ArrayWriter(staging, given, is_shared=False) as writer:
            for name, array in given.items():
                writer.write(name, 0, array)

    folder = negatives_folder(run) / version_name(version)
    about = {"version": version, "num_queries": len(indptr) - 1, **fields}
    manifest = publish_version(folder, write, about, may_publish, digest="xxh3_128")
    may_publish()
    write_latest(folder.parent, folder.name)
    return manifest


def create_negatives(staging: Path, lengths: dict[str, int]) -> None:
    """Make the files of some arrays of a version, by name, for an ArrayWriter to fill."""
    for name, length in lengths.items():
        create_array(staging / f"{name}.npy", length, np.dtype(TYPES[name]))


def open_negatives(run: Path, name: str, num_queries: int, num_passages: int, data_digest: str | None = None) -> Negatives:
    """Return a verified, memory-mapped version of the negatives.

    data_digest: of the data that its rows must be of; None: any.
    Raises TornVersion if a file is missing, altered, or does not fit `num_queries`, `num_passages` and `data_digest`.
    """
    folder = negatives_folder(run) / name
    manifest = open_version(folder)
    mined_from = manifest.get("data_digest")
    if data_digest is not None and mined_from not in (None, data_digest):
        raise TornVersion(f"{folder} was mined from other data ({mined_from[:12]}… instead of {data_digest[:12]}…)")
    negatives = map_negatives(folder, manifest)
    try:
        fits = _fits(negatives, num_queries, num_passages)
    except (OSError, ValueError, TypeError) as error:
        raise TornVersion(f"{folder} cannot be read: {error}") from error
    if not fits:
        raise TornVersion(f"{folder} does not fit {num_queries} queries and {num_passages} passages")
    return negatives


def map_negatives(folder: Path, manifest: dict[str, Any]) -> Negatives:
    """Return a version that another process has opened, and so verified, a moment ago; raises TornVersion."""
    try:
        arrays = {part: map_array(folder / f"{part}.npy") for part in TYPES if f"{part}.npy" in manifest["files"]}
        return Negatives(**arrays, version=int(manifest["version"]), manifest=manifest)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TornVersion(f"{folder} cannot be read: {error}") from error


def _fits(negatives: Negatives, num_queries: int, num_passages: int) -> bool:
    indptr, ids = negatives.indptr, negatives.ids
    if len(indptr) != num_queries + 1 or indptr[0] != 0 or indptr[-1] != len(ids) or len(ids) != len(negatives.scores):
        return False
    lengths = ("teacher_scores", len(ids)), ("first_scores", len(ids)), ("clusters", num_queries)
    if any(len(array) != n for name, n in lengths if (array := getattr(negatives, name)) is not None):
        return False
    if (margins := negatives.margins) is not None:
        needed = ["positive_scores", *(["teacher_scores", "positive_teacher_scores"] if margins.teacher_margin != "off" else [])]
        if any(getattr(negatives, name) is None for name in needed):
            return False
    are_rows = (block.min() >= 0 and block.max() < num_passages for block in _blocks(ids))
    are_ascending = (not np.any(np.diff(block) < 0) for block in _blocks(indptr, overlap=1))
    return all(are_rows) and all(are_ascending)


def _blocks(array: np.ndarray, overlap: int = 0) -> Iterator[np.ndarray]:
    """Yield an array piece by piece: a table may be larger than the memory, and so would be what is computed of all of it."""
    for start in range(0, len(array), BLOCK):
        yield array[start : start + BLOCK + overlap]
