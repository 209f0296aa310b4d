"""The rows that one rank encodes in a step, and which of them belong together."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradcache.ragged import Ragged

# B queries on this rank, M judged positives of a query, n and m rows, x extra columns, c candidates, D width


@dataclass(frozen=True, kw_only=True)
class Tower:
    """What one encoder encodes in this step on this rank.

    Where a backend communicates in forwards (FSDP, ZeRO-3) a rank may be asked to `load` no rows. It then returns any input
    that the encoder takes, because every rank has to take part in the forward.
    """

    encode: Callable[[Any], Any]  # inputs of one chunk -> (m, D) embeddings, with a graph when grad mode is on; or named outputs
    lengths: Tensor  # (n,) int64 on the CPU, tokens of each row
    load: Callable[[Tensor], Any]  # row numbers (m,) int64 on the CPU -> inputs of one chunk
    encode_kept: Callable[[Any], Any] | None = None  # for chunks that keep their graph: without activation checkpointing
    encode_keys: Tensor | None = None  # (n,) int64: rows of equal keys are encoded once; None: every row by itself
    is_frozen: bool = False  # encoded once, without a graph, and no gradient is computed for it
    is_packed: bool = False  # rows of a chunk stand one behind the other, so none is padded to the longest


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Columns that this rank alone holds and that get no gradient: a queue, static negatives, noise."""

    embedding_xD: Tensor
    keys: Tensor  # (x,) int64 content keys


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Pairs of a query and a passage of this rank whose scores the loss sees one by one, sorted by query."""

    query: Tensor  # (c,) int64
    passage: Tensor  # (c,) int64, among this rank's passages
    values: Mapping[str, Tensor] = field(default_factory=dict)  # (c,) each, such as a teacher's scores or a grade
    are_columns: bool = True  # False: a candidate's text is no column of its query, so that its score counts once


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows of all towers in order: the first `num_queries` are queries, the others passages.

    One tied tower has all rows, two towers have the queries and the passages. A rank may have no rows at all.
    Where `derive` makes the queries and passages from what the towers encode, `keys` and all else speak of what it makes.
    """

    towers: Sequence[Tower]
    num_queries: int  # B
    keys: Tensor  # (rows,) int64 content keys: equal key = equal text
    target: Tensor  # (B,) int64: number, among this rank's passages, of each query's positive
    positive_keys: (
        Tensor | Ragged
    )  # keys of all judged positives of each query, the target's may be among them; a (B, M) table or ragged
    positive_values: Mapping[str, Tensor] = field(default_factory=dict)  # of each positive key, in order, such as a grade
    query_values: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # (B,) each, equal names on all ranks; "weight" weighs its loss
    candidates: Candidates | None = None
    own_only: Tensor | None = None  # (passages,) bool: no column of any row, seen as a candidate or a target alone
    extra: Extra | None = None
    outputs: Mapping[str, int] | None = None  # widths of an encoder's named outputs, in order; None: one without a name
    derive: Callable[[Tensor], Tensor] | None = None  # all encoded rows (n, D) -> queries and passages, with a graph

    def __post_init__(self) -> None:
        """Raise ValueError where the parts do not fit together."""
        num_rows = sum(len(tower.lengths) for tower in self.towers)
        if self.derive is None and len(self.keys) != num_rows:
            raise ValueError(f"batch.keys has {len(self.keys)} entries, expected one for each of the {num_rows} rows")
        if len(self.target) != self.num_queries or len(self.positives.counts_n) != self.num_queries:
            raise ValueError(
                f"batch.target has {len(self.target)} and batch.positive_keys {len(self.positives.counts_n)} entries, "
                f"expected one for each of num_queries={self.num_queries}"
            )
        if self.num_queries and not (int(self.target.min()) >= 0 and int(self.target.max()) < self.num_passages):
            raise ValueError(f"batch.target must name passages 0 to {self.num_passages - 1} of this rank")
        for name, values, wanted in self._values():
            if len(values) != wanted:
                raise ValueError(f"batch has {len(values)} values of {name}, expected {wanted}")

    def _values(self) -> list[tuple[str, Tensor, int]]:
        found = [(f"query_values[{name!r}]", values, self.num_queries) for name, values in self.query_values.items()]
        found += [(f"positive_values[{k!r}]", v, len(self.positives.values_m)) for k, v in self.positive_values.items()]
        found.append(("positive_keys", self.positives.values_m, int(self.positives.counts_n.sum())))
        if self.candidates is not None:
            most = len(self.candidates.query)
            found += [("candidates.passage", self.candidates.passage, most)]
            found += [(f"candidates.values[{name!r}]", values, most) for name, values in self.candidates.values.items()]
        if self.own_only is not None:
            found.append(("own_only", self.own_only, self.num_passages))
        return found

    @property
    def num_passages(self) -> int:
        """Passages on this rank."""
        return len(self.keys) - self.num_queries

    @property
    def positives(self) -> Ragged:
        """The keys of the judged positives of each query."""
        return self.positive_keys if isinstance(self.positive_keys, Ragged) else Ragged.of_table(self.positive_keys)

    @functools.cached_property
    def judged(self) -> Ragged:
        """The distinct keys of the positives of each query, its target's among them."""
        return self.positives.with_column(self.keys[self.num_queries :][self.target]).distinct()

    @functools.cached_property
    def hidden(self) -> Ragged:
        """The keys of the candidates of each query that are no columns of its row."""
        if self.candidates is None or self.candidates.are_columns:
            return Ragged(self.keys[:0], torch.zeros(self.num_queries, dtype=torch.int64))
        keys = self.keys[self.num_queries :][self.candidates.passage]
        return Ragged(keys, torch.bincount(self.candidates.query, minlength=self.num_queries))

    @property
    def shared(self) -> Tensor:
        """Numbers of the passages that are columns."""
        every = torch.arange(self.num_passages)
        return every if self.own_only is None else every[~self.own_only.cpu()]

    @property
    def is_trained(self) -> tuple[bool, bool]:
        """Whether queries, and whether passages, get a gradient."""
        if self.derive is not None:
            return True, True
        edges = [0, *itertools.accumulate(len(tower.lengths) for tower in self.towers)]
        if len(self.towers) == 2 and edges[1] == self.num_queries:
            return not self.towers[0].is_frozen, not self.towers[1].is_frozen
        is_trained = any(not tower.is_frozen for tower in self.towers)
        return is_trained, is_trained
