"""The format of a run's tensors on disk: each rank writes what it alone holds, and any number of ranks reads it back.

A tensor is a row of elements, whatever its shape; a part holds runs of elements, each with its place in its tensor. Every
backend shards into such runs, so what one has written another can read, on more ranks or on fewer. Files are safetensors.
Of what several ranks hold, as many write as there are PART_BYTES; a reader opens a file once, if it needs something of it.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from trainer.handoff.manifest import TornVersion

PART_BYTES = 64 * 2**20  # of a file at least, where several ranks could write it: hundreds of tiny ones burden a file server

Index = dict[str, tuple[int, list[tuple[int, int, str]]]]  # of a tensor: its elements, and (start, stop, file) of its runs


@dataclass(frozen=True)
class Fragment:
    """A run of elements of a flattened tensor."""

    name: str
    start: int  # of the run in the tensor
    numel: int  # of the whole tensor
    values: Tensor  # (n,) float32

    def share(self, rank: int, num_ranks: int) -> "Fragment":
        """Return a rank's part of a run that all ranks hold; sizes differ by one at most."""
        first, last = (len(self.values) * r // num_ranks for r in (rank, rank + 1))
        return Fragment(self.name, self.start + first, self.numel, self.values[first:last])


def writing_share(copy: int, num_copies: int, num_bytes: int) -> tuple[int, int] | None:
    """Return which share of how many the holder of a copy writes, None where others write all; writers are spread evenly."""
    num_shares = min(num_copies, max(1, math.ceil(num_bytes / PART_BYTES)))
    share = copy * num_shares // num_copies
    is_first_of_share = copy == 0 or (copy - 1) * num_shares // num_copies != share
    return (share, num_shares) if is_first_of_share else None


def part_name(rank: int, num_ranks: int) -> str:
    return f"part-{rank:05d}-of-{num_ranks:05d}.safetensors"


def write_part(path: Path, fragments: Iterable[Fragment]) -> None:
    """Write the fragments of one rank; the file appears whole or not at all. Names must differ."""
    held = [f for f in fragments if len(f.values)]
    places = {f.name: [f.start, f.numel] for f in held}
    beside = path.with_name(f".{path.name}")
    try:
        safetensors.torch.save_file({f.name: f.values for f in held}, beside, {"places": json.dumps(places)})
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class Parts:
    """All parts in a folder, read where they are needed."""

    def __init__(self, folder: Path, index: Index | None = None):
        """index: `index` of another reader of the folder; None: opens every part."""
        self._folder = folder
        self._opened: dict[str, Any] = {}
        self.index = self._read_index() if index is None else index

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self.index)

    def numel(self, name: str) -> int:
        """Return the elements of a whole tensor, 0 for one that is not there."""
        return self.index.get(name, (0, []))[0]

    def check(self, name: str, start: int, count: int) -> None:
        """Raise TornVersion unless every one of `count` elements from `start` on is there; opens nothing."""
        known = sum(stop - first for _, first, stop, _ in self._pieces(name, start, count))
        if known != count:
            raise TornVersion(f"{self._folder} holds {known} of the {count} elements of {name} from {start} on")

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Return `count` elements from `start` on, float32; raises TornVersion where one is missing."""
        self.check(name, start, count)
        found = torch.empty(count)
        for run_start, first, stop, file in self._pieces(name, start, count):
            found[first - start : stop - start] = self._open(file).get_slice(name)[first - run_start : stop - run_start]
        return found

    def _pieces(self, name: str, start: int, count: int) -> Iterator[tuple[int, int, int, str]]:
        """Yield (start of the run, first and last element wanted of it, file)."""
        for run_start, run_stop, file in self.index.get(name, (0, []))[1]:
            first, stop = max(run_start, start), min(run_stop, start + count)
            if first < stop:
                yield run_start, first, stop, file

    def _open(self, file: str):
        if file not in self._opened:  # stays mapped, without a file descriptor
            self._opened[file] = safe_open(self._folder / file, framework="pt")
        return self._opened[file]

    def _read_index(self) -> Index:
        index: Index = {}
        for path in sorted(self._folder.glob("part-*.safetensors")):
            part = self._open(path.name)
            for name, (start, numel) in json.loads(part.metadata()["places"]).items():
                _, runs = index.setdefault(name, (numel, []))
                runs.append((start, start + part.get_slice(name).get_shape()[0], path.name))
        return index
