"""The format of a run's tensors on disk: each rank writes what it holds, and any number of ranks reads it back.

A tensor is a row of elements, whatever its shape; a part holds runs of elements, each with its place in its tensor. Every
backend shards into such runs, so what one has written another can read, on more ranks or on fewer. Files are safetensors.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from trainer.handoff.manifest import TornVersion


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

    def __init__(self, folder: Path):
        self._folder = folder
        self._runs: dict[str, list[tuple[int, int, Path]]] = {}  # (start, stop, file) of each tensor
        self._numel: dict[str, int] = {}
        for file in sorted(folder.glob("part-*.safetensors")):
            with safe_open(file, framework="pt") as part:
                places = json.loads(part.metadata()["places"])
                for name, (start, numel) in places.items():
                    stop = start + part.get_slice(name).get_shape()[0]
                    self._runs.setdefault(name, []).append((start, stop, file))
                    self._numel[name] = numel

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._runs)

    def numel(self, name: str) -> int:
        """Return the elements of a whole tensor, 0 for one that is not there."""
        return self._numel.get(name, 0)

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Return `count` elements from `start` on, float32; raises TornVersion where one is missing."""
        found, known = torch.empty(count), 0
        for first, last, file in self._runs.get(name, []):
            low, high = max(first, start), min(last, start + count)
            if low < high:
                with safe_open(file, framework="pt") as part:
                    found[low - start : high - start] = part.get_slice(name)[low - first : high - first]
                known += high - low
        if known != count:
            raise TornVersion(f"{self._folder} holds {known} of the {count} elements of {name} from {start} on")
        return found
