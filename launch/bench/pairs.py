"""Pairs of a query and a passage, as a step takes them: query i belongs to passage i."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradcache import Batch, Tower
from launch.counted import counted
from trainer.data.datasets import RetrievalData
from trainer.encoder.tokens import TokenTable
from trainer.errors import InputError


@dataclass(frozen=True)
class Pairs:
    """Texts of this rank."""

    texts: tuple[Any, Any]
    tables: tuple[TokenTable, TokenTable]

    def __len__(self) -> int:
        return len(self.texts[0])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every text."""
        return np.concatenate([table.lengths for table in self.tables])

    def batch(self, pairs: int, encode: Callable[..., Tensor], device: torch.device) -> Batch:
        """Return the first pairs, from the first again where there are too few."""
        row_n = np.arange(pairs) % len(self)

        def tower(table: TokenTable) -> Tower:
            def load(chosen: Tensor) -> dict[str, Tensor]:
                return {name: values.to(device) for name, values in table.pad(row_n[chosen.numpy()]).items()}

            return Tower(encode=encode, lengths=torch.from_numpy(table.lengths[row_n].astype(np.int64)), load=load)

        towers = [tower(table) for table in self.tables]
        keys = torch.from_numpy(np.concatenate([table.keys(row_n) for table in self.tables]))
        target = torch.arange(pairs)
        return Batch(towers=towers, num_queries=pairs, keys=keys, target=target, positive_keys=keys[pairs:, None])


def distinct_pairs(data: RetrievalData, num_pairs: int) -> np.ndarray:
    """Return (query row, corpus row) of judged pairs with distinct texts on both sides, (n, 2) int64."""
    queries, corpus = data.queries["text"], data.corpus["text"]
    seen_queries: set[str] = set()
    seen_passages: set[str] = set()
    pairs = []
    for split in sorted(data.qrels, key=lambda name: name != "train"):
        rows = data.training_queries(split)
        indptr, positives = data.positives(rows, split)
        for number, row in enumerate(rows):
            passage = int(positives[indptr[number]])
            if queries[row] not in seen_queries and corpus[passage] not in seen_passages:
                seen_queries.add(queries[row])
                seen_passages.add(corpus[passage])
                pairs.append((int(row), passage))
            if len(pairs) == num_pairs:
                return np.array(pairs)
    raise InputError(f"{data.path} has {counted(len(pairs), 'pair')} of distinct texts, fewer than {num_pairs}; lower --queries")
