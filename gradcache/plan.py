"""What a step encodes on this rank, chunk by chunk, and how one chunk is encoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcache.batch import Tower
from gradcache.chunks import equalize_chunks, plan_chunks, unique_rows
from gradcache.replay import replay_seed

# n rows of the batch, u distinct rows, which are encoded, m rows of a chunk


@dataclass(frozen=True)
class Chunk:
    """Rows of one tower that are encoded together."""

    tower: Tower
    rows: Tensor  # (m,) row numbers within the tower; none where only other ranks have rows left
    places: range  # theirs among the distinct rows of all chunks, which stand in the order in which they are encoded
    lengths: Tensor  # (m,) tokens
    seed: int  # of everything random in its encoding

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())

    @property
    def num_padded_tokens(self) -> int:
        """Rows x the longest of them; of packed rows their tokens."""
        if self.tower.is_packed:
            return self.num_tokens
        return len(self.rows) * int(self.lengths.max()) if len(self.rows) else 0

    def halves(self) -> list["Chunk"]:
        """Return two chunks of half the rows; each draws its own dropout."""
        half = (len(self.rows) + 1) // 2
        return [
            replace(self, rows=self.rows[of], places=self.places[of], lengths=self.lengths[of], seed=replay_seed(self.seed, i))
            for i, of in enumerate((slice(0, half), slice(half, None)))
        ]


@dataclass(frozen=True)
class Plan:
    """The encodings of a step on this rank."""

    chunks: list[Chunk]
    place_n: Tensor  # for every row of the batch its place among the distinct rows
    num_distinct: int  # u


def plan_encoding(
    towers: Sequence[Tower], chunk_tokens: int, seed: int, step: int, rank: int, num_chunks: Sequence[int] | None = None
) -> Plan:
    """Return the chunks of all towers; rows of equal encode_keys of a tower are encoded once.

    num_chunks: of each tower, where every rank must have as many; at least as many as the budget asks for.
    """
    chunks: list[Chunk] = []
    places, num_distinct = [], 0
    for number, tower in enumerate(towers):
        first_u, number_n = unique_rows(tower.encode_keys, len(tower.lengths))
        lengths_u = tower.lengths[first_u]
        planned = plan_chunks(lengths_u, chunk_tokens, tower.is_packed)
        if num_chunks is not None:
            planned = equalize_chunks(planned, num_chunks[number])
        place_u = torch.empty_like(first_u)
        for rows in planned:
            place = range(num_distinct, num_distinct + len(rows))
            place_u[rows] = torch.arange(place.start, place.stop)
            seed_of_chunk = replay_seed(seed, step, rank, number, len(chunks))
            chunks.append(Chunk(tower=tower, rows=first_u[rows], places=place, lengths=lengths_u[rows], seed=seed_of_chunk))
            num_distinct = place.stop
        places.append(place_u[number_n])
    return Plan(chunks, torch.cat(places), num_distinct)


def chunks_of_each_tower(plan: Plan, towers: Sequence[Tower]) -> list[int]:
    """Return how many chunks each tower has."""
    return [sum(chunk.tower is tower for chunk in plan.chunks) for tower in towers]


def encode_chunk(chunk: Chunk, *, with_graph: bool, is_kept: bool = False) -> Tensor:
    """Return the embeddings of a chunk, (m, D), named outputs side by side; the same draws of dropout whenever it is called."""
    torch.manual_seed(chunk.seed)
    # Under autocast, weights that were cast without grad mode would be taken again with it, and get no gradient.
    torch.clear_autocast_cache()
    with torch.set_grad_enabled(with_graph):
        encode = chunk.tower.encode_kept if is_kept and chunk.tower.encode_kept is not None else chunk.tower.encode
        embedding_mD = encode(chunk.tower.load(chunk.rows))
        if isinstance(embedding_mD, Mapping):
            embedding_mD = torch.cat(list(embedding_mD.values()), dim=1)
    if embedding_mD.ndim != 2 or (len(chunk.rows) and len(embedding_mD) != len(chunk.rows)):
        raise ValueError(f"encode returned {tuple(embedding_mD.shape)} for {len(chunk.rows)} rows; expected (rows, width)")
    return embedding_mD
