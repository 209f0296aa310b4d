"""Both encodings of a step's rows: without graph at first, with graph chunk by chunk behind the loss (phases 1, 2 and 6).

The last chunks may keep their graph in the first encoding; they need no second one. Memory: one chunk's graph, and those
that are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradcache.batch import Tower
from gradcache.chunks import plan_chunks, unique_rows
from gradcache.replay import replay_seed
from gradcache.sync import GradientSync

# n rows of the batch, u distinct rows, which are encoded, m rows of a chunk


@dataclass(frozen=True)
class Chunk:
    """Rows of one tower that are encoded together."""

    tower: Tower
    rows: Tensor  # (m,) row numbers within the tower
    places: Tensor  # (m,) their places among the distinct rows of all towers
    seed: int  # of everything random in its encoding
    num_tokens: int
    num_padded_tokens: int  # rows x the longest of them


@dataclass(frozen=True)
class Plan:
    """The encodings of a step on this rank."""

    chunks: list[Chunk]
    place_n: Tensor  # for every row of the batch its place among the distinct rows
    num_distinct: int  # u


def plan_encoding(towers: Sequence[Tower], chunk_tokens: int, seed: int, step: int, rank: int) -> Plan:
    """Return the chunks of all towers; rows of equal encode_keys of a tower are encoded once."""
    chunks: list[Chunk] = []
    places, num_distinct = [], 0
    for number, tower in enumerate(towers):
        first_u, place_n = unique_rows(tower.encode_keys, len(tower.lengths))
        places.append(place_n + num_distinct)
        lengths_u = tower.lengths[first_u]
        for rows in plan_chunks(lengths_u, chunk_tokens):
            lengths = lengths_u[rows]
            chunks.append(
                Chunk(
                    tower=tower,
                    rows=first_u[rows],
                    places=rows + num_distinct,
                    seed=replay_seed(seed, step, rank, number, len(chunks)),
                    num_tokens=int(lengths.sum()),
                    num_padded_tokens=len(rows) * int(lengths.max()),
                )
            )
        num_distinct += len(first_u)
    return Plan(chunks, torch.cat(places), num_distinct)


def encode_chunk(chunk: Chunk, *, with_graph: bool) -> Tensor:
    """Return the embeddings of a chunk, (m, D); the same draws of dropout whenever it is called."""
    torch.manual_seed(chunk.seed)
    with torch.set_grad_enabled(with_graph):
        embedding_mD = chunk.tower.encode(chunk.tower.load(chunk.rows))
    if embedding_mD.ndim != 2 or len(embedding_mD) != len(chunk.rows):
        raise ValueError(f"encode returned {tuple(embedding_mD.shape)} for {len(chunk.rows)} rows; expected (rows, width)")
    return embedding_mD


def encode_all(plan: Plan, keep_graphs: int | Literal["all"]) -> tuple[Tensor | None, dict[int, Tensor]]:
    """Return the detached embeddings of the batch's rows, (n, D), None without rows, and the kept graphs by chunk."""
    num_chunks = len(plan.chunks)
    num_kept = num_chunks if keep_graphs == "all" else min(keep_graphs, num_chunks)
    if num_kept < 0:
        raise ValueError(f'keep_graphs={keep_graphs} must be at least 0, or "all"')
    encoded = [encode_chunk(chunk, with_graph=i >= num_chunks - num_kept) for i, chunk in enumerate(plan.chunks)]
    if not encoded:
        return None, {}
    # Chunk order -> order of the distinct rows -> order of the batch, in one copy.
    row_of_place = torch.empty(plan.num_distinct, dtype=torch.int64)
    row_of_place[torch.cat([chunk.places for chunk in plan.chunks])] = torch.arange(plan.num_distinct)
    embedding_uD = torch.cat([embedding.detach() for embedding in encoded])
    kept = {i: encoded[i] for i in range(num_chunks - num_kept, num_chunks)}
    return embedding_uD[row_of_place[plan.place_n].to(embedding_uD.device)], kept


def backpropagate(plan: Plan, kept: dict[int, Tensor], gradient_nD: Tensor, sync: GradientSync) -> None:
    """Carry the gradient of the embeddings into the parameters. Empties `kept`.

    Kept graphs come first, so that their memory is free before the next chunk is encoded again.
    Collective: one synchronisation of the parameters, in the last backward, also without rows.
    """
    gradient_uD = gradient_nD.new_zeros(plan.num_distinct, gradient_nD.shape[1])
    gradient_uD.index_add_(0, plan.place_n.to(gradient_nD.device), gradient_nD)
    order = [*kept, *(i for i in range(len(plan.chunks)) if i not in kept)]
    for i in order[:-1]:
        _run_backward(_surrogate(plan.chunks[i], kept.pop(i, None), gradient_uD, sync))
    # Without rows there is nothing to add, but the others wait for this rank.
    nothing = gradient_uD.sum()
    last = _surrogate(plan.chunks[order[-1]], kept.pop(order[-1], None), gradient_uD, sync) if order else nothing
    sync.last_backward(last)


def _surrogate(chunk: Chunk, embedding_mD: Tensor | None, gradient_uD: Tensor, sync: GradientSync) -> Tensor:
    """Return a scalar whose backward puts the given gradient into the chunk's embeddings."""
    if embedding_mD is None:
        embedding_mD = encode_chunk(chunk, with_graph=True)
    gradient_mD = gradient_uD[chunk.places.to(gradient_uD.device)].to(embedding_mD.dtype)
    return (embedding_mD * gradient_mD).sum() * sync.gradient_scale()


def _run_backward(surrogate: Tensor) -> None:
    if surrogate.requires_grad:  # a frozen tower has no graph
        surrogate.backward()
