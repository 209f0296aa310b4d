"""Batches of plain vectors: what a closed form is compared with, without an encoder in between."""

import torch
from torch import Tensor

from gradcache import Batch, LossOptions, NoSync, StepResult, Temperature, Tower, cached_step


def vectors(query: Tensor, passage: Tensor, positive_keys: Tensor | None = None) -> Batch:
    """Return a batch whose embeddings are the given rows; query i's positive is passage i, and no two texts are equal.

    positive_keys: (queries, M); the key of passage i is the number of queries + i. None: each query has one positive.
    """
    rows, num_queries = torch.cat([query, passage]), len(query)
    tower = Tower(encode=lambda x: x, lengths=torch.ones(len(rows), dtype=torch.int64), load=lambda chosen: rows[chosen])
    keys = torch.arange(len(rows))
    positive_keys = keys[num_queries : 2 * num_queries, None] if positive_keys is None else positive_keys
    return Batch(
        towers=[tower], num_queries=num_queries, keys=keys, target=torch.arange(num_queries), positive_keys=positive_keys
    )


def step_of_vectors(batch: Batch, loss: LossOptions, scale: float) -> tuple[StepResult, Temperature]:
    """Take a step in one process and return what it found; the gradients stay with the vectors. scale: 1 / temperature."""
    temperature = Temperature(1 / scale, learnable=True).double()
    step = {"sync": NoSync(), "group": None, "chunk_tokens": 10**6, "keep_graphs": "all", "seed": 0, "step": 0}
    return cached_step(batch, loss=loss, temperature=temperature, **step), temperature
