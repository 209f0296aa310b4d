"""Chunk tokens and kept graphs from measured memory.

A probe encodes the longest rows twice, few and then twice as many, and counts what each graph holds for its backward: two
points of a line, fixed part and bytes per token. From that and a limit come the chunk's tokens and the number of chunks
that keep their graph. Counting what autograd saves works on every device, and does not depend on what an allocator keeps.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gradcache.batch import Tower
from gradcache.plan import encode_chunk, plan_encoding
from gradcache.replay import borrowed_generators

log = logging.getLogger(__name__)

# Gradients of activations come to life while activations die: at most about half as much again, seen with BERT.
BACKWARD_SHARE = 1.5
CHUNK_SHARE = 0.25  # of the room, for the chunk at work; the rest is for kept graphs, which save time
MOST_CHUNK_TOKENS = {"cpu": 4096, "cuda": 65536}  # more are not faster
PROBE_TOKENS = 1024


@dataclass(frozen=True)
class Budget:
    """What a step may use."""

    chunk_tokens: int
    keep_graphs: int | Literal["all"]

    def halved(self) -> "Budget":
        """Return the budget after a chunk has not fitted."""
        return Budget(max(1, self.chunk_tokens // 2), 0)


def probe_budget(towers: Sequence[Tower], limit_bytes: int, device: torch.device) -> Budget:
    """Return the budget of steps like this one, and log what was chosen and why.

    limit_bytes: for graphs alone; the caller takes off what else a step holds: gradients, optimizer, the loss's tile.
    Encodes rows of the tower whose graph takes most. Does not communicate, unless the encoder does. Raises ValueError if
    not even one text fits.
    """
    fixed, per_token, longest = max((_graph_line(tower) for tower in towers if len(tower.lengths)), key=lambda line: line[1])
    budget = choose_budget(limit_bytes, fixed, per_token, longest, MOST_CHUNK_TOKENS.get(device.type, 65536))
    num_chunks = len(plan_encoding(towers, budget.chunk_tokens, 0, 0, 0).chunks)
    if isinstance(budget.keep_graphs, int) and budget.keep_graphs >= num_chunks:
        budget = Budget(budget.chunk_tokens, "all")
    log.info(
        "chunks of %d tokens, graphs kept: %s of %d; a token's graph takes %.0f KiB, and %.2f GiB are for graphs",
        budget.chunk_tokens, budget.keep_graphs, num_chunks, per_token / 2**10, limit_bytes / 2**30,
    )  # fmt: skip
    return budget


def choose_budget(limit_bytes: int, fixed: float, per_token: float, longest: int, most_tokens: int) -> Budget:
    """Return chunk tokens and kept graphs for a line of graph bytes: fixed + per_token x tokens."""
    at_work = BACKWARD_SHARE * per_token
    if limit_bytes < fixed + at_work * longest:
        raise ValueError(
            f"{limit_bytes / 2**30:.2f} GiB are left for graphs, and one text of {longest} tokens needs "
            f"{(fixed + at_work * longest) / 2**30:.2f} GiB; set chunk.memory_gib higher, or shorter texts"
        )
    tokens = int((limit_bytes * CHUNK_SHARE - fixed) / at_work)
    tokens = max(longest, min(most_tokens, tokens // 256 * 256))
    room = limit_bytes - (fixed + at_work * tokens)
    return Budget(tokens, max(0, int(room / (fixed + per_token * tokens))))


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Return the bytes that a forward keeps for its backward: each storage once, parameters and leaves aside."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        source = tensor if tensor._base is None else tensor._base
        if not (source.is_leaf and source.requires_grad):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # alive until all is counted, or a storage's address could be given out twice
    del kept
    return sum(storages.values())


def _graph_line(tower: Tower) -> tuple[float, float, int]:
    """Return (fixed bytes, bytes per token, the longest row's tokens) of a tower's graphs."""
    longest = int(tower.lengths.max())
    sizes = []
    for tokens in (max(PROBE_TOKENS, longest), 2 * max(PROBE_TOKENS, longest)):
        # Without encode_keys: equal rows are as good for a probe.
        chunk = plan_encoding([tower], tokens, 0, 0, 0).chunks[0]
        with borrowed_generators():
            sizes.append((chunk.num_padded_tokens, saved_bytes(functools.partial(encode_chunk, chunk, with_graph=True))))
    (few, few_bytes), (many, many_bytes) = sizes
    if many == few:  # hardly any rows
        return 0.0, many_bytes / many, longest
    per_token = (many_bytes - few_bytes) / (many - few)
    return max(0.0, few_bytes - per_token * few), per_token, longest
