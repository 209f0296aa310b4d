"""Centroids of IVF indexes, kept from refresh to refresh: embeddings move slowly, and so do the places where they are dense.

Centroids that were trained for a version are kept in its folder, and later versions start from them, until new ones are
trained. A version that is made again after its service was killed starts from the same centroids.
"""

import hashlib
import shutil
from pathlib import Path

import numpy as np

from trainer.handoff.manifest import disk_error

FOLDER = "centroids"


class Centroids:
    """The centroids of one version's indexes, one array a shard."""

    def __init__(self, run: Path, version: int, factory: str, shard_rows: int, starts_anew: bool = False):
        """starts_anew: take none of an earlier version."""
        kind = hashlib.sha256(f"{factory} {shard_rows}".encode()).hexdigest()[:8]
        self._parent, self._version = run / FOLDER / kind, version
        earlier = [] if starts_anew else [v for v in self._versions() if v < version]
        self.source = max(earlier, default=None)  # the version that they were trained for

    def of_shard(self, shard: int) -> np.ndarray | None:
        """Return the centroids to start from, (K, D) float32, or None."""
        if self.source is None:
            return None
        try:
            return np.load(self._file(self.source, shard), allow_pickle=False)
        except (OSError, ValueError):
            return None

    def keep(self, shard: int, centroid_KD: np.ndarray) -> None:
        """Write what was trained; nothing if they were there."""
        file = self._file(self._version, shard)
        if self.of_shard(shard) is not None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_suffix(".part")
            with open(beside, "wb") as out:
                np.save(out, centroid_KD, allow_pickle=False)
            beside.replace(file)
        except OSError as error:
            raise disk_error(error, file) from error

    def prune(self) -> None:
        """Delete what no later version starts from. Rank 0 only, after the version is published."""
        for version in sorted(v for v in self._versions() if v <= self._version)[:-1]:
            shutil.rmtree(self._parent / f"v{version:06d}", ignore_errors=True)

    def _versions(self) -> list[int]:
        return [int(folder.name[1:]) for folder in self._parent.glob("v*")]

    def _file(self, version: int, shard: int) -> Path:
        return self._parent / f"v{version:06d}" / f"shard-{shard:06d}.npy"
