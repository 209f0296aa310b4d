"""The same step in one process and one graph: the oracle for `cached_step`.

Written to be obviously right, not to be fast or small: all ranks' batches, the full score matrix, masks by comparing keys one by
one, autograd for everything. Shares with the step only the plan of chunks and their seeds, so that both draw the same
dropout, and the objective, which has its own tests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradcache.batch import Batch
from gradcache.dense import reference_loss
from gradcache.options import LossOptions
from gradcache.plan import Plan, chunks_of_each_tower, encode_chunk, plan_encoding
from gradcache.replay import borrowed_generators
from gradcache.temperature import Temperature


def reference_step(
    batches: Sequence[Batch],
    *,
    loss: LossOptions,
    temperature: Temperature,
    chunk_tokens: int,
    seed: int,
    step: int,
    progress: float = 0.0,
    equal_chunks: bool = False,
) -> float:
    """Return the mean loss over the queries of all ranks and add its gradient to the parameters and the temperature.

    batches: one for each rank, in order, with towers that encode in this process. Does not communicate.
    equal_chunks: plan as a step does whose backend communicates in forwards, which needs as many chunks on every rank.
    """
    plans = [plan_encoding(batch.towers, chunk_tokens, seed, step, rank) for rank, batch in enumerate(batches)]
    if equal_chunks:
        counts = [chunks_of_each_tower(plan, batch.towers) for plan, batch in zip(plans, batches, strict=True)]
        most = [max(count) for count in zip(*counts, strict=True)]
        plans = [plan_encoding(batch.towers, chunk_tokens, seed, step, rank, most) for rank, batch in enumerate(batches)]
    with borrowed_generators():
        embedded = [_encode(plan) for plan in plans]
    total = reference_loss(embedded, batches, loss=loss, scale=temperature.scale(), progress=progress)
    total.backward()
    return total.item()


def _encode(plan: Plan) -> Tensor:
    """Return the embeddings of one rank's rows in one graph, with the draws of that rank's chunks."""
    row_of_place: dict[int, Tensor] = {}
    for chunk in plan.chunks:
        if len(chunk.rows):
            with_graph = not chunk.tower.is_frozen
            row_of_place |= dict(zip(chunk.places, encode_chunk(chunk, with_graph=with_graph), strict=True))
    return torch.stack([row_of_place[place] for place in plan.place_n.tolist()]) if row_of_place else torch.empty(0, 0)
