"""Clusters of training queries, and batches made of whole clusters.

The miner writes the clusters into one file, whole or not at all; the trainer reads the file between two epochs. A cluster is
cut only if no batch has room for all of it, or where a window of batches ends. So an epoch has as many steps, of the same
sizes, as without clusters. Memory: eight bytes a query for the assignment in force, and some sixteen bytes a cluster for an
epoch.
"""

import bisect
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.shuffle import mix, shuffle
from trainer.errors import InputError

BLOCK = 1 << 20  # queries looked at together


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
    """Return an assignment; raises InputError if the file holds none, or one for other queries."""
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


class ClusteredEpoch:
    """The queries of an epoch, cluster after cluster; clusters and those within one come in an order of the epoch's own."""

    def __init__(self, members: "Members", times: Callable[[np.ndarray], np.ndarray], key: np.ndarray):
        """times: how often each of some queries comes in this epoch. key: decides the order."""
        self._members, self._times, self._key = members, times, key
        sizes = np.zeros(members.num, np.int64)
        for start in range(0, len(members.rows), BLOCK):
            stop = min(start + BLOCK, len(members.rows))
            owner = np.searchsorted(members.indptr, np.arange(start, stop), side="right") - 1
            sizes += np.bincount(owner, times(members.rows[start:stop]), minlength=members.num).astype(np.int64)
        self._turns = shuffle(np.arange(members.num), members.num, self._key)
        self._stops = np.cumsum(sizes[self._turns])

    def between(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the queries at the places from start to stop, and the cluster of each."""
        first = int(np.searchsorted(self._stops, start, side="right"))
        chosen = self._turns[first : int(np.searchsorted(self._stops, stop - 1, side="right")) + 1]
        lows, highs = self._members.indptr[chosen], self._members.indptr[chosen + 1]
        rows = np.concatenate([self._members.rows[low:high] for low, high in zip(lows.tolist(), highs.tolist(), strict=True)])
        turn = np.repeat(np.arange(len(chosen)), highs - lows)
        order = np.lexsort((mix(rows.astype(np.uint64) ^ self._key), turn))
        rows, turn = rows[order], turn[order]
        times = self._times(rows)
        skipped = start - (int(self._stops[first - 1]) if first else 0)
        cut = slice(skipped, skipped + stop - start)
        return np.repeat(rows, times)[cut], chosen[np.repeat(turn, times)[cut]]


@dataclass(frozen=True, eq=False)
class Members:
    """The queries of each cluster: rows[indptr[c]:indptr[c + 1]]."""

    rows: np.ndarray  # int64
    indptr: np.ndarray  # (num + 1,) int64

    @property
    def num(self) -> int:
        return len(self.indptr) - 1


def members_of(of_query: np.ndarray, first: int) -> Members:
    """Return the queries by cluster; of_query: the cluster of each query from the number `first` on."""
    order = np.argsort(of_query, kind="stable")
    stops = np.append(np.flatnonzero(np.diff(of_query[order])) + 1, len(order))
    return Members(order + first, np.concatenate([[0], stops]))


def pack_clusters(cluster_n: np.ndarray, batch: int, generator: np.random.Generator) -> np.ndarray:
    """Return an order of n places; each slice of `batch` places holds whole clusters, as far as they fit.

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
