"""A batch of random vectors, as many on every rank, that a module encodes."""

from collections.abc import Callable

import torch
from torch import Tensor

from gradcache import Batch, Tower


def made_batch(rank: int, encode: Callable[[Tensor], Tensor], queries: int = 8, per_query: int = 1, width: int = 16) -> Batch:
    """Return queries, each with its positive and `per_query - 1` further passages, of inputs of so many components."""
    num_rows = queries * (1 + per_query)
    inputs = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(rank))
    keys = 10_000 * rank + torch.arange(num_rows)
    return Batch(
        towers=[Tower(encode=encode, lengths=torch.ones(num_rows, dtype=torch.int64), load=lambda rows: inputs[rows])],
        num_queries=queries,
        keys=keys,
        target=torch.arange(queries),
        positive_keys=keys[queries : 2 * queries, None],
    )
