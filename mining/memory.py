"""The memory of a rank of the service, planned before anything is encoded or searched.

The plan counts what the process holds already, and the largest of its phases. Embeddings are memory-mapped and released shard
by shard, so one shard counts; the others are in the system's page cache, which the system frees when it needs memory. What
grows with the number of queries is cut: they are searched in as many passes over the passages, and drawn in as small tiles, as
the limit needs.
"""

import logging
import math
import platform
from dataclasses import dataclass

import psutil
import torch

from mining.find.known_pairs import bytes_of_pair
from mining.ranks import Ranks
from trainer.encoder.encode import ENCODE_TOKENS, ENCODE_TOKENS_CUDA
from trainer.encoder.gpu_share import free_of_share
from trainer.encoder.topk import bytes_of_query, tile_shape
from trainer.errors import InputError

log = logging.getLogger(__name__)

GIB = 2**30
QUERY_TILE = 4096  # queries that a rank filters and samples at once, at most: with k = 200 a few MB of candidates
LIBRARIES = 96 << 20  # bytes that libraries take when they are first used: kernels, buffers, FAISS
# Bytes of a candidate of this rank's queries: score, id, content key and what filters and sampling sort.
DRAW_BYTES = 64
EXCHANGE_BYTES = 32  # of a candidate of all queries of a tile: its key as found, sent and received
TEXT_BYTES = 25  # of a text: its length, keys of tokens and of the text, memory-mapped, and whether it may be a candidate
QUERY_BYTES = 64  # of a training query: its rows, positives and judgements
ENTRY_BYTES = 24  # of a passage, while equal texts of an index are found
FREE_SHARE = 0.5  # of the machine's free memory, if mine.memory_gib is not set


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What decides how much memory a refresh takes."""

    num_queries: int
    num_passages: int
    shard_rows: int
    width: int  # of an embedding
    stored_bytes: int  # of one number on disk
    token_width: int  # numbers that the encoder holds at once for each token of a batch
    top_k: int  # of a search
    num_candidates: int  # of a query, whoever found them
    num_known: int  # pairs that are scored as their shard passes
    num_clustered: int  # embeddings that k-means holds; 0: none
    num_ranks: int
    index_bytes: int  # of a passage in this rank's index; 0: exact search
    num_trained: int  # passages that an index is trained from, on rank 0
    device_type: str


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a rank by what takes them; phases follow each other, so the largest counts."""

    held: dict[str, int]
    phases: dict[str, int]
    query_pass: int  # queries whose best passages are held at once
    query_tile: int  # queries drawn at once, by all ranks together
    limit: int

    @property
    def total(self) -> int:
        return sum(self.held.values()) + max(self.phases.values())

    def as_text(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.held.items())
        phases = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.phases.items())
        return (
            f"memory of a rank: {self.total / GIB:.2f} of {self.limit / GIB:.2f} GiB: {parts}, and the largest of {phases}; "
            f"{self.query_pass} queries are searched at once, and {self.query_tile} drawn"
        )

    def as_json(self) -> dict[str, float | int | dict[str, float]]:
        """Return the plan in GiB."""
        held, phases = ({k: round(v / GIB, 4) for k, v in part.items()} for part in (self.held, self.phases))
        total, limit = round(self.total / GIB, 4), round(self.limit / GIB, 4)
        cuts = {"query_pass": self.query_pass, "query_tile": self.query_tile}
        return {"total_gib": total, "limit_gib": limit, "held_gib": held, "phases_gib": phases, **cuts}


def plan_memory(sizes: Sizes, process_bytes: int, limit: int, device_limit: int | None = None) -> MemoryPlan:
    """Return the plan with the fewest passes, and then the largest tile of queries, that fits; raises InputError if none does.

    device_limit: bytes of a GPU that queries and their best passages may take.
    """
    rows, _ = tile_shape(sizes.top_k, sizes.device_type)
    # Whole tiles of scores: the last bits of a product do not depend on the memory.
    most = -(-sizes.num_queries // rows) * rows
    passes = [rows * -(-most // (rows << halvings)) for halvings in range((most // rows).bit_length())]
    of_query = bytes_of_query(sizes.top_k, sizes.width, sizes.device_type, sizes.stored_bytes)
    if device_limit is not None:
        passes = [size for size in passes if size * of_query <= device_limit] or [passes[-1]]
    largest = min(QUERY_TILE * sizes.num_ranks, sizes.num_queries)
    tiles = [-(-largest >> halvings) for halvings in range(max(1, (largest // 32).bit_length()))]
    for query_pass in passes:
        for query_tile in tiles:
            plan = _plan(sizes, process_bytes, limit, query_pass, query_tile)
            if plan.total <= limit:
                return plan
    raise InputError(
        f"mine.memory_gib={limit / GIB:.2f} is too little: {plan.as_text()}; set mine.memory_gib to "
        f"{math.ceil(plan.total / GIB * 100) / 100:.2f} or more, or search.top_k lower"
    )


def memory_limit(ranks: Ranks, memory_gib: float | None) -> int:
    """Return the bytes that this rank may take, what it holds included. Collective."""
    name = platform.node()
    ranks_here = ranks.exchange([name] * ranks.num_ranks).count(name)
    if memory_gib is not None:
        return int(memory_gib * GIB)
    return held_now() + int(FREE_SHARE * psutil.virtual_memory().available / ranks_here)


def device_limit(device: torch.device) -> int | None:
    """Return the bytes of a GPU that queries and their best passages may take, beside the encoder's batches; None on a CPU."""
    free = free_of_share(device)
    return None if free is None else int(FREE_SHARE * free)


def held_now() -> int:
    """Return the resident bytes of this process."""
    return psutil.Process().memory_info().rss


def _plan(sizes: Sizes, process_bytes: int, limit: int, query_pass: int, query_tile: int) -> MemoryPlan:
    shard_bytes = min(sizes.shard_rows, sizes.num_passages) * sizes.width
    score_rows, score_columns = tile_shape(sizes.top_k, sizes.device_type)
    on_cpu, is_exact = sizes.device_type == "cpu", sizes.index_bytes == 0
    tokens = ENCODE_TOKENS if on_cpu else ENCODE_TOKENS_CUDA
    # As computed, as stored if that is another type, and one being written.
    copies = 4 + sizes.stored_bytes * (2 if sizes.stored_bytes < 4 else 1)
    encoding = shard_bytes * copies + tokens * (8 * 3 + (4 * sizes.token_width if on_cpu else 0))
    columns = min(score_columns, sizes.num_passages)
    score_tile = 2 * 4 * min(score_rows, sizes.num_queries) * columns if on_cpu else 0  # scores, and what survives of them
    product = 2 * 4 * columns * sizes.width + score_tile
    drawing = query_tile * (sizes.top_k * EXCHANGE_BYTES + sizes.num_candidates * DRAW_BYTES // sizes.num_ranks)
    drawing += shard_bytes * sizes.stored_bytes
    held = {
        "process": process_bytes,
        "libraries": LIBRARIES,
        "texts and judgements": TEXT_BYTES * (sizes.num_passages + sizes.num_queries) + QUERY_BYTES * sizes.num_queries,
        "known pairs": bytes_of_pair(sizes.num_known) * sizes.num_known,
        "index": -(-sizes.num_passages // sizes.num_ranks) * sizes.index_bytes,
    }
    if is_exact and on_cpu:
        held["queries at once"] = query_pass * bytes_of_query(sizes.top_k, sizes.width, sizes.device_type, sizes.stored_bytes)
    phases = {"encoding": encoding + product * is_exact, "searching": max(drawing, product)}
    if sizes.num_clustered:
        phases["clustering"] = sizes.num_clustered * sizes.width * 4 * 2  # the table, and a shard's part of it on its way
    if sizes.index_bytes:
        phases["opening the index"] = sizes.num_passages * ENTRY_BYTES
    if sizes.num_trained:
        phases["training the index"] = sizes.num_trained * sizes.width * 4 * 2  # the sample, and what FAISS trains from
    return MemoryPlan(held, phases, query_pass, query_tile, limit)
