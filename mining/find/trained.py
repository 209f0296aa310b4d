"""The trained state of an index: centroids, codebooks, rotations, the same for the whole corpus and on every rank.

Embeddings move slowly from checkpoint to checkpoint, and so do the places where they are dense: a version takes the state of an
earlier one, till its lists are uneven or more of them must be looked into. A version that is made again takes the state that
it took before. Rank 0 trains and writes; a state is a version of handoff/manifest.py, whole or absent.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mining.find.index import empty_index, ivf_of, load_faiss
from mining.find.on_gpu import train_on_gpu
from mining.table.sampling import stream
from trainer.data.shuffle import mix
from trainer.handoff.manifest import TornVersion, clean_staging, open_version, publish_version, write_atomically
from trainer.handoff.retention import delete_version

log = logging.getLogger(__name__)

FOLDER, FILE, MEASURED = "index", "trained.faiss", "measured.json"
BLOCK_ROWS = 1 << 22  # whose numbers are mixed at once
# An earlier state is taken while its lists are at most so many times as uneven, and so many times as many of them are looked
# into, as when it was new.
MOST_UNEVEN, MOST_NPROBE = 2.0, 2.0


@dataclass(frozen=True)
class Trained:
    """Which state a version takes."""

    version: int  # that it was trained for
    digest: str


class TrainedStates:
    """The states of a run, as the refresh of one version sees them."""

    def __init__(self, run: Path, version: int, about: dict[str, Any]):
        """about: JSON, all that a state depends on but the weights: the factory string, the width, the texts."""
        self._parent, self._version, self._about = run / FOLDER, version, about

    def find(self) -> Trained | None:
        """Return the state to take, or None: one is to be trained. What is torn or of something else is said. Rank 0 only."""
        clean_staging(self._parent)
        measured = self._measured()
        for version in sorted((v for v in self._versions() if v <= self._version), reverse=True):
            folder = self._folder(version)
            if measured.get("version") == version and self._version > measured.get("until", self._version):
                return None
            try:
                manifest = open_version(folder)
            except TornVersion as torn:
                log.warning("the trained state of version %d cannot be used: %s", version, torn)
                continue
            if manifest.get("about") == self._about:
                return _trained(version, manifest)
            was, known = manifest.get("about") or {}, self._about
            other = ", ".join(
                f"{key} is {was.get(key)!r} there and {known[key]!r} here" for key in known if was.get(key) != known[key]
            )
            log.warning("the trained state of version %d is of something else: %s", version, other)
        return None

    def publish(self, index: Any) -> Trained:
        """Write the state of a trained, empty index for this version. Rank 0 only."""
        folder = self._folder(self._version)
        delete_version(folder)  # torn, of something else, or not good enough
        faiss = load_faiss(str(self._about["factory"]))

        def write(staging: Path) -> None:
            with open(staging / FILE, "wb") as file:
                file.write(faiss.serialize_index(index).data)

        return _trained(self._version, publish_version(folder, write, {"about": self._about}))

    def open(self, trained: Trained) -> Any:
        """Return an empty index of a state. Every rank; raises TornVersion."""
        folder = self._folder(trained.version)
        if _trained(trained.version, open_version(folder)) != trained:
            raise TornVersion(f"{folder} is another one than rank 0 has found")
        faiss = load_faiss(str(self._about["factory"]))
        try:
            return faiss.deserialize_index(np.fromfile(folder / FILE, np.uint8))
        except RuntimeError as error:
            raise TornVersion(f"{folder / FILE} is no index that this FAISS reads") from error

    def settle(self, trained: Trained, unevenness: float, nprobe: int) -> None:
        """Keep what was measured of a state, or judge by that whether later versions take it; delete all others. Rank 0 only."""
        new = {"version": trained.version, "unevenness": unevenness, "nprobe": nprobe}
        was = self._measured()
        if trained.version == self._version or was.get("version") != trained.version:
            write_atomically(self._parent / MEASURED, json.dumps(new))
        elif unevenness > MOST_UNEVEN * was["unevenness"] or nprobe > MOST_NPROBE * was["nprobe"]:
            log.info(
                "the lists of version %d are %.2f times as uneven as if all were alike (%.2f when new), and %d are looked into "
                "(%d when new): the next version trains its own",
                trained.version, unevenness, was["unevenness"], nprobe, was["nprobe"],
            )  # fmt: skip
            write_atomically(self._parent / MEASURED, json.dumps({**was, "until": self._version}))
        for version in self._versions():
            if version != trained.version:
                delete_version(self._folder(version))

    def _measured(self) -> dict[str, Any]:
        try:
            found = json.loads((self._parent / MEASURED).read_text())
            return {key: float(value) for key, value in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _versions(self) -> list[int]:
        return [int(folder.name[1:]) for folder in self._parent.glob("v*")]

    def _folder(self, version: int) -> Path:
        return self._parent / f"v{version:06d}"


def sample_rows(is_entry_N: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Return about `num` of the entries, or all if there are no more: ascending rows, drawn by a hash of the row alone."""
    num_entries = int(is_entry_N.sum())
    limit = np.uint64(min(2**64 - 1, int(2**64 * min(1.0, num / max(1, num_entries)))))
    found = []
    for start in range(0, len(is_entry_N), BLOCK_ROWS):
        rows = start + np.flatnonzero(is_entry_N[start : start + BLOCK_ROWS])
        found.append(rows[mix(stream(seed, 0) + rows.astype(np.uint64)) <= limit])
    return np.concatenate(found)


def train_index(factory: str, sample_nD: np.ndarray, device: torch.device) -> Any:
    """Return an empty index trained from a sample, float32. FAISS starts from a fixed seed."""
    faiss = load_faiss(factory)
    index = empty_index(factory, sample_nD.shape[1])
    ivf = ivf_of(faiss, index)
    kept = train_on_gpu(faiss, ivf, device)
    index.train(sample_nD)
    if kept is not None:
        ivf.clustering_index = None
    return index


def unevenness(sizes_L: np.ndarray) -> float:
    """Return how many times as much a query looks at as in lists of one size: FAISS's imbalance factor; 1: all are alike."""
    return float(len(sizes_L) * np.square(sizes_L.astype(np.float64)).sum() / max(1.0, float(sizes_L.sum())) ** 2)


def _trained(version: int, manifest: dict[str, Any]) -> Trained:
    entry = manifest["files"][FILE]
    return Trained(version, str(entry.get("sha256") or entry))
