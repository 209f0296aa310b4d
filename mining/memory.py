"""The memory of a rank of the service, planned before anything is encoded or searched.

The plan counts what the process holds already, and the largest of its phases. Embeddings are memory-mapped and released shard
by shard, so one shard counts; the others are in the system's page cache, which the system frees when it needs memory. What
grows with the number of queries is cut into tiles that fit into the limit.
"""

import logging
import math
import platform
from dataclasses import dataclass

import psutil

from mining.ranks import Ranks
from trainer.encoder.encode import ENCODE_TOKENS, ENCODE_TOKENS_CUDA
from trainer.encoder.topk import tile_shape
from trainer.errors import InputError

log = logging.getLogger(__name__)

GIB = 2**30
# Queries of a tile at most: results of k = 200 are a few MB then. A GPU reads all passages anew for each tile.
MAX_QUERY_TILE, MAX_QUERY_TILE_GPU = 4096, 16384
LIBRARIES = 96 << 20  # bytes that libraries take when they are first used: kernels, buffers, FAISS
# Bytes of a candidate of this rank's queries: score, id, content key and what filters and sampling sort.
DRAW_BYTES = 64
EXCHANGE_BYTES = 40  # of a candidate of all queries: keys as found, sent and received
DRAWN_BYTES = 36  # of a negative on rank 0: id and score, of a rank, of all ranks, of the file
FREE_SHARE = 0.5  # of the machine's free memory, if mine.memory_gib is not set


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What decides how much memory a refresh takes."""

    num_queries: int
    num_passages: int
    shard_rows: int
    block_rows: int  # that have an index of their own
    width: int  # of an embedding
    stored_bytes: int  # of one number on disk
    token_width: int  # numbers that the encoder holds at once for each token of a batch
    top_k: int  # of a search
    num_candidates: int  # of a query, whoever found them
    num_clustered: int  # embeddings that k-means holds; 0: none
    num_negatives: int
    num_ranks: int
    index_bytes: int  # of a passage in this rank's index; 0: exact search
    device_type: str


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a rank by what takes them; phases follow each other, so the largest counts."""

    held: dict[str, int]
    phases: dict[str, int]
    query_tile: int  # queries searched at once
    limit: int

    @property
    def total(self) -> int:
        return sum(self.held.values()) + max(self.phases.values())

    def as_text(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.held.items())
        phases = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.phases.items())
        return (
            f"memory of a rank: {self.total / GIB:.2f} of {self.limit / GIB:.2f} GiB: {parts}, and the largest of {phases}; "
            f"queries in tiles of {self.query_tile}"
        )

    def as_json(self) -> dict[str, float | int | dict[str, float]]:
        """Return the plan in GiB."""
        held, phases = ({k: round(v / GIB, 4) for k, v in part.items()} for part in (self.held, self.phases))
        total, limit = round(self.total / GIB, 4), round(self.limit / GIB, 4)
        return {"total_gib": total, "limit_gib": limit, "held_gib": held, "phases_gib": phases, "query_tile": self.query_tile}


def plan_memory(sizes: Sizes, process_bytes: int, limit: int) -> MemoryPlan:
    """Return the plan with the largest tile of queries that fits; raises InputError if not even one row of tiles does."""
    rows, _ = tile_shape(sizes.top_k, sizes.device_type)
    largest = MAX_QUERY_TILE if sizes.device_type == "cpu" else MAX_QUERY_TILE_GPU
    most = min(largest, -(-sizes.num_queries // rows) * rows)
    # Whole tiles of scores: the last bits of a product do not depend on the memory.
    tiles = [rows * n for n in range(max(1, most // rows), 0, -1)]
    for tile in tiles:
        plan = _plan(sizes, process_bytes, limit, tile)
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


def held_now() -> int:
    """Return the resident bytes of this process."""
    return psutil.Process().memory_info().rss


def _plan(sizes: Sizes, process_bytes: int, limit: int, query_tile: int) -> MemoryPlan:
    tile = min(query_tile, sizes.num_queries)
    shard_bytes = min(sizes.shard_rows, sizes.num_passages) * sizes.width
    score_rows, score_columns = tile_shape(sizes.top_k, sizes.device_type)
    on_cpu = sizes.device_type == "cpu"
    tokens = ENCODE_TOKENS if on_cpu else ENCODE_TOKENS_CUDA
    # As computed, as stored if that is another type, and one being written.
    copies = 4 + sizes.stored_bytes * (2 if sizes.stored_bytes < 4 else 1)
    encoding = shard_bytes * copies + tokens * (8 * 3 + (4 * sizes.token_width if on_cpu else 0))
    candidates = tile * sizes.num_candidates
    columns = min(score_columns, sizes.num_passages)
    score_tile = 2 * 4 * min(score_rows, tile) * columns if on_cpu else 0  # scores, and what survives of them
    searching = shard_bytes * sizes.stored_bytes + 2 * 4 * columns * sizes.width + score_tile
    searching += tile * sizes.width * 4 * 2 + candidates * EXCHANGE_BYTES + candidates * DRAW_BYTES // sizes.num_ranks
    searching += sizes.num_queries * sizes.num_negatives * DRAWN_BYTES
    per_rank = -(-sizes.num_passages // sizes.num_ranks)
    held = {
        "process": process_bytes,
        "libraries": LIBRARIES,
        "keys of texts": 24 * (sizes.num_passages + sizes.num_queries),  # lengths, keys of tokens and texts, memory-mapped
        "index": per_rank * sizes.index_bytes,
    }
    phases = {"encoding": encoding, "searching": searching}
    if sizes.num_clustered:
        phases["clustering"] = sizes.num_clustered * sizes.width * 4 * 2  # the table, and a shard's part of it on its way
    if sizes.index_bytes:
        block_bytes = min(sizes.block_rows, sizes.num_passages) * sizes.width
        phases["indexing"] = block_bytes * 8 + shard_bytes * sizes.stored_bytes  # joined, and what FAISS trains from
    return MemoryPlan(held, phases, query_tile, limit)
