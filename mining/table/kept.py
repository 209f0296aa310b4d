"""Keeps negatives that are drawn and not yet published, so that a killed service searches only for the other queries.

What is drawn for a query depends only on what `about` names, so a service with another number of ranks can use the parts.
"""

import contextlib
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Table = dict[str, np.ndarray]  # columns of one length


@dataclass(frozen=True)
class Part:
    """The negatives of some queries next to each other: one rank's share of a tile."""

    place: int  # of the first query
    lengths: np.ndarray  # (Q,) negatives of each
    columns: Table
    counts: dict[str, int]
    dropped: dict[str, int]  # by filter


class KeptTiles:
    """The parts of one version, in a folder of the run."""

    def __init__(self, run: Path, about: dict[str, Any]):
        """about: all that a draw depends on, as JSON."""
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
        self._all = run / "status" / "miner.tiles"
        self._folder = self._all / digest[:32]

    def open(self) -> None:
        """Delete what was kept for other versions. Rank 0, before the others keep any."""
        for folder in self._all.glob("*"):
            if folder != self._folder:
                shutil.rmtree(folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)

    def keep(self, part: Part) -> None:
        """Write a part; raises OSError."""
        if len(part.lengths):
            file_name = f"{part.place:012d}-{len(part.lengths)}.npz"
            unfinished = self._folder / f"{file_name}.{os.getpid()}"
            arrays: dict[str, Any] = {f"column_{name}": column for name, column in part.columns.items()}
            arrays |= {"lengths": part.lengths, "about": np.array(json.dumps([part.counts, part.dropped]))}
            with open(unfinished, "wb") as file:
                np.savez(file, **arrays)
            os.replace(unfinished, self._folder / file_name)

    def read(self, tile: slice) -> list[Part] | None:
        """Return the parts that make up a tile, or None if any query of it is missing."""
        found: list[Part] = []
        place = tile.start
        while place < tile.stop:
            part = next(self._beginning_at(place, tile.stop), None)
            if part is None:
                return None
            found.append(part)
            place += len(part.lengths)
        return found

    def forget(self) -> None:
        """Delete all that is kept."""
        shutil.rmtree(self._all, ignore_errors=True)

    def _beginning_at(self, place: int, stop: int) -> Iterator[Part]:
        for path in sorted(self._folder.glob(f"{place:012d}-*.npz")):
            if place + int(path.stem.split("-")[1]) <= stop:
                with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # torn: drawn anew
                    yield _read(path, place)


def _read(path: Path, place: int) -> Part:
    with np.load(path) as arrays:  # a zip file: sums of its members are checked
        counts, dropped = json.loads(str(arrays["about"]))
        columns = {name.removeprefix("column_"): arrays[name] for name in arrays.files if name.startswith("column_")}
        return Part(place, arrays["lengths"], columns, counts, dropped)
