"""The rows that one rank encodes in a step, and which of them belong together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# B queries on this rank, M judged positives of a query, n and m rows, D width


@dataclass(frozen=True, kw_only=True)
class Tower:
    """What one encoder encodes in this step on this rank.

    Where a backend communicates in forwards (FSDP, ZeRO-3) a rank may be asked to `load` no rows. It then returns any input
    that the encoder takes, because every rank has to take part in the forward.
    """

    encode: Callable[[Any], Tensor]  # inputs of one chunk -> (m, D) embeddings, with a graph when grad mode is on
    lengths: Tensor  # (n,) int64 on the CPU, tokens of each row
    load: Callable[[Tensor], Any]  # row numbers (m,) int64 on the CPU -> inputs of one chunk
    encode_kept: Callable[[Any], Tensor] | None = None  # for chunks that keep their graph: without activation checkpointing
    encode_keys: Tensor | None = None  # (n,) int64: rows of equal keys are encoded once; None: every row by itself


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows of all towers in order: the first `num_queries` are queries, the others passages.

    One tied tower has all rows, two towers have the queries and the passages. A rank may have no rows at all.
    """

    towers: Sequence[Tower]
    num_queries: int  # B
    keys: Tensor  # (rows,) int64 content keys: equal key = equal text
    target: Tensor  # (B,) int64: number, among this rank's passages, of each query's positive
    positive_keys: Tensor  # (B, M) int64: keys of all judged positives, filled up with the target's; M may differ

    def __post_init__(self) -> None:
        """Raise ValueError where the parts do not fit together."""
        num_rows = sum(len(tower.lengths) for tower in self.towers)
        if len(self.keys) != num_rows:
            raise ValueError(f"batch.keys has {len(self.keys)} entries, expected one for each of the {num_rows} rows")
        if len(self.target) != self.num_queries or len(self.positive_keys) != self.num_queries:
            raise ValueError(
                f"batch.target has {len(self.target)} and batch.positive_keys {len(self.positive_keys)} entries, "
                f"expected one for each of num_queries={self.num_queries}"
            )
        if self.num_queries and not (int(self.target.min()) >= 0 and int(self.target.max()) < self.num_passages):
            raise ValueError(f"batch.target must name passages 0 to {self.num_passages - 1} of this rank")

    @property
    def num_passages(self) -> int:
        """Passages on this rank."""
        return len(self.keys) - self.num_queries

    def positives(self, width: int) -> Tensor:
        """Return positive_keys with the target's key first and as filling, (B, width + 1) int64."""
        target_keys = self.keys[self.num_queries :][self.target][:, None]
        filling = target_keys.expand(-1, width - self.positive_keys.shape[1])
        return torch.cat([target_keys, self.positive_keys, filling], dim=1)
