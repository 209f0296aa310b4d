"""What the directions of a loss are made from: the rows here, those that have travelled, and the keys of all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from gradcache.batch import Batch
from gradcache.exchange import Counts, Keys, window_of
from gradcache.masks import Pairing
from gradcache.options import LossOptions
from gradcache.ragged import Ragged
from gradcache.terms import Source
from gradcache.widths import View

# N columns of all ranks


@dataclass(frozen=True, kw_only=True)
class Pools:
    """The rows of this rank, and those of all ranks that have travelled."""

    query: Source
    target: Source  # of each query
    passage: Source  # that are columns
    every_passage: Source  # of this rank
    extra: Source | None
    travelled: Mapping[str, Source] = field(default_factory=dict)  # of all ranks: queries, targets, passages

    def columns(self, name: Literal["queries", "targets", "passages"], is_spread: bool) -> Source:
        """Return this rank's own columns of a side, or those of all ranks."""
        if not is_spread:
            return self.travelled[name]
        return {"queries": self.query, "targets": self.target, "passages": self.passage}[name]

    def rows(self, name: Literal["queries", "targets"], is_spread: bool) -> Source:
        """Return the rows of a side: of this rank, or where its columns are spread of all ranks."""
        if is_spread:
            return self.travelled[name]
        return self.query if name == "queries" else self.target


@dataclass(frozen=True, kw_only=True)
class Field:
    """What directions are made from."""

    batch: Batch
    options: LossOptions
    pools: Pools
    keys: Keys
    counts: Counts
    rank: int
    queries_travel: bool  # and passages stay; otherwise the other way round
    second_view: View | None  # of the second matrix, where the objective wants one of an output's name

    def window(self, name: str, is_spread: bool) -> range:
        """Return this rank's columns among those of all ranks: its own, or where they have travelled all."""
        return self.counts.window(name, self.rank) if is_spread else range(sum(getattr(self.counts, name)))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Columns of one kind."""

    kind: int
    source: Source
    window: range  # of the columns of all ranks
    first_N: Tensor
    row_keys: Ragged  # of the rows of all ranks: a column that has one of them is no negative
    keys_of_ranks: list[int]  # how many of them are of the rows of each rank
    column_keys: Ragged

    def pairing(self, counts: Counts, rank: int | None, window: range | None = None) -> Pairing:
        """Return these columns, or those of another window, and the rows of a rank, None: of all ranks, as what to relate."""
        row_keys = self.row_keys
        if rank is not None:
            row_keys = row_keys.slice(counts.window("queries", rank), window_of(self.keys_of_ranks, rank))
        return Pairing(row_keys, self.column_keys, self.first_N, self.window if window is None else window)
