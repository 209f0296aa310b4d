"""Clusters of training queries, and batches made of whole clusters.

Who clusters writes one file, whole or not at all; who trains reads it between two epochs. A cluster is cut only where no
batch has room for all of it, so an epoch has as many steps, of the same sizes, as without clusters.
"""

import bisect
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.errors import InputError


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which cluster each training query belongs to."""

    of_query: np.ndarray  # (num_queries,) int64, any numbers
    version: int


def write_clusters(path: Path, clusters: Clusters) -> None:
    """Write the file of an assignment, in the place of an older one; readers see one or the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    with open(staging, "wb") as file:
        np.savez(file, of_query=np.asarray(clusters.of_query, np.int64), version=np.int64(clusters.version))
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)


def read_clusters(path: Path, num_queries: int) -> Clusters:
    """Return an assignment; raises InputError if the file is no such thing, or of other queries."""
    try:
        with np.load(path, allow_pickle=False) as found:
            of_query, version = found["of_query"], int(found["version"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        expected = "expected an .npz file with of_query and version"
        raise InputError(f"{path} holds no clusters ({error}); {expected}; set batch.clusters") from error
    if of_query.shape != (num_queries,) or of_query.dtype.kind not in "iu":
        raise InputError(
            f"{path} has clusters of shape {of_query.shape} and type {of_query.dtype}, and there are {num_queries} training "
            "queries; expected a whole number for each; set batch.clusters to another file"
        )
    return Clusters(of_query.astype(np.int64), version)


def pack_clusters(cluster_n: np.ndarray, batch: int, generator: np.random.Generator) -> np.ndarray:
    """Return an order of n places in which each slice of `batch` is made of whole clusters as far as they fit.

    cluster_n: cluster of each place. The largest go first, each into the batch that it fills best (best-fit decreasing);
    one that fits nowhere is cut. Ties and the order of batches are random.
    """
    grouped = np.argsort(cluster_n, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(cluster_n[grouped]) != 0]) if len(grouped) else np.zeros(0, np.int64)
    stops = np.append(starts[1:], len(grouped))
    turns = generator.permutation(len(starts))
    turns = turns[np.argsort(starts[turns] - stops[turns], kind="stable")]
    bins = _Bins(len(grouped), batch, generator)
    for start, stop in zip(starts[turns].tolist(), stops[turns].tolist(), strict=True):
        bins.add(start, stop)
    return grouped[bins.places()]


class _Bins:
    """Batches that are being filled, by the room they have left."""

    def __init__(self, num_places: int, batch: int, generator: np.random.Generator):
        num_full, rest = divmod(num_places, batch)
        self._with_room: dict[int, list[int]] = {}
        self._rooms: list[int] = []  # the keys above, ascending
        self._pieces: list[list[tuple[int, int]]] = [[] for _ in range(num_full + (rest > 0))]
        for number in generator.permutation(num_full).tolist():
            self._open(number, batch)
        if rest:
            self._open(num_full, rest)  # the smaller batch stays the last

    def add(self, start: int, stop: int) -> None:
        """Put the places from start to stop into the batch with the least room that has enough, else into several."""
        while start < stop:
            at = bisect.bisect_left(self._rooms, stop - start)
            room = self._rooms[min(at, len(self._rooms) - 1)]
            number = self._with_room[room].pop()
            if not self._with_room[room]:
                del self._with_room[room]
                self._rooms.remove(room)
            taken = min(room, stop - start)
            self._pieces[number].append((start, start + taken))
            if room > taken:
                self._open(number, room - taken)
            start += taken

    def places(self) -> np.ndarray:
        """Return all places, batch after batch."""
        pieces = [np.arange(start, stop) for batch in self._pieces for start, stop in batch]
        return np.concatenate([np.zeros(0, np.int64), *pieces])

    def _open(self, number: int, room: int) -> None:
        if room not in self._with_room:
            self._with_room[room] = []
            bisect.insort(self._rooms, room)
        self._with_room[room].append(number)
