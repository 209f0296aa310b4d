"""Chunk tokens and kept graphs from measured memory.

A probe encodes three chunks of the batch, a small one, one of twice as many rows of its length, and one of shorter rows, and
counts what each graph holds for its backward. That gives the bytes of any chunk: a fixed part, and for each token some that
are its own and some for every token that it attends to. From these and a limit come the chunk's tokens and the number of
chunks that keep their graph. Counting what autograd saves works on every device, and does not depend on what an allocator
keeps.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gradcache.batch import Tower
from gradcache.plan import Chunk, encode_chunk, plan_encoding
from gradcache.replay import borrowed_generators

log = logging.getLogger(__name__)

# Gradients of activations come to life while activations die: at most about half as much again, seen with BERT.
BACKWARD_SHARE = 1.5
CHUNK_SHARE = 0.25  # of the room, for the chunk at work; kept graphs may use all of it before, and they save time
KEPT_SHARE = 0.9  # of the room, for kept graphs: the next batch has other lengths
MOST_CHUNK_TOKENS = {"cpu": 4096, "cuda": 65536}  # more are not faster
PROBE_TOKENS = 1024


@dataclass(frozen=True)
class Budget:
    """What a step may use."""

    chunk_tokens: int
    keep_graphs: int | Literal["all"]

    def halved(self) -> "Budget":
        """Return a smaller budget, after memory was too small: one without kept graphs, or else with smaller chunks."""
        return Budget(self.chunk_tokens if self.keep_graphs else max(1, self.chunk_tokens // 2), 0)


@dataclass(frozen=True)
class GraphCost:
    """Bytes of a chunk's graph."""

    fixed: float
    per_token: float
    per_token_and_length: float = 0.0  # of padded rows

    def of(self, padded_tokens: int, length: int) -> float:
        """Return the bytes of a graph of rows padded to one length."""
        return self.fixed + (self.per_token + self.per_token_and_length * length) * padded_tokens

    def of_chunk(self, chunk: Chunk) -> float:
        """Return the bytes of a chunk's graph."""
        return self.of(chunk.num_padded_tokens, int(chunk.lengths.max()))


class Graphs(NamedTuple):
    """What a probe found to fit."""

    budget: Budget
    chunk_bytes: float  # of the graph of a chunk, with what its backward takes
    kept_bytes: float


def probe_budget(towers: Sequence[Tower], limit_bytes: int, device: torch.device) -> Budget:
    """Return the budget of steps like this one, and log what was chosen and why.

    limit_bytes: for graphs alone; the caller takes off what else a step holds: gradients, optimizer, the loss's tile.
    Encodes rows of every tower. Does not communicate, unless the encoder does. Raises ValueError if not even one text fits.
    """
    return plan_graphs(towers, limit_bytes, device).budget


def plan_graphs(towers: Sequence[Tower], limit_bytes: float, device: torch.device) -> Graphs:
    """Do what `probe_budget` does, and return also what is to be held."""
    costs = [(measure_graphs(tower), int(tower.lengths.max())) for tower in towers if len(tower.lengths)]
    cost, longest = max(costs, key=lambda found: found[0].of(PROBE_TOKENS, found[1]))
    tokens = choose_tokens(limit_bytes, cost, longest, MOST_CHUNK_TOKENS.get(device.type, 65536))
    chunks = plan_encoding(towers, tokens, 0, 0, 0).chunks
    kept = kept_within(limit_bytes - (BACKWARD_SHARE - 1) * cost.of(tokens, longest), chunks, cost)
    log.info(
        "chunks of %d tokens, graphs kept: %d of %d; a text of %d tokens takes %.1f MiB, and %.2f GiB are for graphs",
        tokens, kept, len(chunks), longest, (cost.of(longest, longest) - cost.fixed) / 2**20, limit_bytes / 2**30,
    )  # fmt: skip
    kept_bytes = sum(cost.of_chunk(chunk) for chunk in chunks[len(chunks) - kept :])
    return Graphs(Budget(tokens, "all" if kept == len(chunks) else kept), BACKWARD_SHARE * cost.of(tokens, longest), kept_bytes)


def choose_tokens(limit_bytes: float, cost: GraphCost, longest: int, most_tokens: int) -> int:
    """Return the tokens of a chunk whose rows are all as long as the longest; raises ValueError if none fits."""
    one_text = BACKWARD_SHARE * cost.of(longest, longest)
    if limit_bytes < one_text:
        raise ValueError(
            f"{max(0.0, limit_bytes) / 2**30:.2f} GiB are left for graphs, and one text of {longest} tokens needs "
            f"{one_text / 2**30:.2f} GiB; set chunk.memory_gib higher, or shorter texts"
        )
    per_token = cost.of(1, longest) - cost.fixed
    tokens = int((limit_bytes * CHUNK_SHARE / BACKWARD_SHARE - cost.fixed) / per_token)
    return max(longest, min(most_tokens, tokens // 256 * 256))


def kept_within(room_bytes: float, chunks: Sequence[Chunk], cost: GraphCost) -> int:
    """Return how many of the last chunks may keep their graphs at once."""
    kept, used = 0, 0.0
    for chunk in reversed(chunks):
        used += cost.of_chunk(chunk)
        if used > KEPT_SHARE * room_bytes:
            break
        kept += 1
    return kept


def measure_graphs(tower: Tower) -> GraphCost:
    """Return what a tower's graphs cost; encodes three chunks of its rows."""
    longest = max(1, int(tower.lengths.max()))
    tokens = max(PROBE_TOKENS, longest)
    # Without encode_keys: equal rows are as good for a probe.
    few_chunks, many_chunks = (plan_encoding([replace(tower, encode_keys=None)], t, 0, 0, 0).chunks for t in (tokens, 2 * tokens))
    few, many, short = few_chunks[0], many_chunks[0], few_chunks[len(few_chunks) // 2]
    few_bytes, many_bytes, short_bytes = (_graph_bytes(chunk) for chunk in (few, many, short))
    if many.num_padded_tokens == few.num_padded_tokens:  # hardly any rows
        return GraphCost(0.0, few_bytes / max(1, few.num_padded_tokens))
    slope = (many_bytes - few_bytes) / (many.num_padded_tokens - few.num_padded_tokens)
    fixed = max(0.0, few_bytes - slope * few.num_padded_tokens)
    short_length = int(short.lengths.max())
    if short_length == longest:
        return GraphCost(fixed, slope)
    short_slope = (short_bytes - fixed) / short.num_padded_tokens
    steeper = max(0.0, (slope - short_slope) / (longest - short_length))
    return GraphCost(fixed, slope - steeper * longest, steeper)


def _graph_bytes(chunk: Chunk) -> int:
    with borrowed_generators():
        return saved_bytes(functools.partial(encode_chunk, chunk, with_graph=True, is_kept=True))


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Return the bytes that a forward keeps for its backward: each storage once, parameters and leaves aside."""
    storages: dict[int, torch.UntypedStorage] = {}  # kept until all are counted, because a freed address could be used again

    def pack(tensor: Tensor) -> Tensor:
        source = tensor if tensor._base is None else tensor._base
        if not (source.is_leaf and source.requires_grad):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage  # not by its data: tensors without memory are counted, too
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(storage.nbytes() for storage in storages.values())
