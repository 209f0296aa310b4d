"""A small world for tests of the stream: embeddings in real shards on disk, judgements, and ranks that see their shards."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mining.find.asked import Asker
from mining.find.embeddings import Embeddings
from mining.find.known_pairs import KnownPairs, PairsOf
from mining.ranks import Ranks
from mining.table.judgements import Judgements
from trainer.encoder.settings import EncodeSettings
from trainer.encoder.shards import Shards

NUM_QUERIES, NUM_PASSAGES, WIDTH, SHARD_ROWS = 150, 230, 24, 32  # nothing divides: 5 blocks of queries, 8 shards, the last of 6


def judgements(num_held_out: int = 9) -> Judgements:
    """Query q has the positives q % 7 and, if q is odd, q % 7 + 20; passages 3, 28, ... are held out, positives among them."""
    rows = [[q % 7, q % 7 + 20][: 1 + q % 2] for q in range(NUM_QUERIES)]
    indptr, flat = np.cumsum([0, *map(len, rows)]), np.concatenate(rows)
    allowed = np.ones(NUM_PASSAGES, bool)
    allowed[3 : 3 + 25 * num_held_out : 25] = False
    return Judgements(np.arange(NUM_QUERIES) * 3, indptr, flat, np.ones(len(flat)), np.arange(NUM_QUERIES), indptr, flat, allowed)


@dataclass
class World:
    """Unit vectors of queries and passages, a tenth of which repeat others, stored as float16 or float32."""

    folder: Path
    stored: str
    device: str = "cpu"

    @cached_property
    def queries(self) -> Embeddings:
        return self._publish("queries", normal(NUM_QUERIES, 1), 64)

    @cached_property
    def passages(self) -> Embeddings:
        vectors = normal(NUM_PASSAGES, 2)
        vectors[::10] = vectors[5]
        return self._publish("passages", vectors, SHARD_ROWS)

    @cached_property
    def exact(self) -> np.ndarray:
        """Return all scores, (Q, N) float64."""
        tables = (self.queries.read(np.arange(NUM_QUERIES)), self.passages.read(np.arange(NUM_PASSAGES)))
        query_QD, passage_ND = (table.astype(np.float64) for table in tables)
        return query_QD @ passage_ND.T

    def owners(self, num_ranks: int, seed: int = 0) -> np.ndarray:
        """Return a rank for each shard; some ranks may have none."""
        return np.random.default_rng(seed).integers(num_ranks, size=self.passages.shards.num_shards).astype(np.int32)

    def stream(self, ranks: Ranks, owners: np.ndarray, *consumers) -> None:
        """Let consumers see this rank's shards, every other as a tensor, in an order of the rank's own."""
        for shard in reversed(np.flatnonzero(owners == ranks.rank).tolist()):
            vectors = self.passages.shard(shard)
            for each in consumers:
                each.see(shard, torch.tensor(vectors, device=self.device) if shard % 2 else vectors)

    def stored_queries(self, places: slice) -> torch.Tensor:
        """Return the queries of a pass as they are stored, on the device."""
        return torch.from_numpy(self.queries.read_stored(np.arange(places.start, places.stop))).to(self.device)

    def known(self, ranks: Ranks, owners: np.ndarray, sources: list[PairsOf], places=slice(0, NUM_QUERIES)) -> KnownPairs:
        """Return the known pairs of a pass, all scored."""
        known = KnownPairs(places, self.stored_queries(places), sources, SHARD_ROWS, NUM_PASSAGES)
        self.stream(ranks, owners, known)
        return known

    def asker(self, ranks: Ranks, owners: np.ndarray) -> Asker:
        """Return what asks for other pairs, with tables that no other rank has opened."""
        return Asker(ranks, owners, Embeddings(self.queries.shards), Embeddings(self.passages.shards), self.device)

    def _publish(self, name: str, vectors: np.ndarray, shard_rows: int) -> Embeddings:
        settings = EncodeSettings(dtype="fp32", stored={"float16": "fp16", "float32": "fp32"}[self.stored])
        shards = Shards(self.folder / name, len(vectors), shard_rows, settings)
        for shard in shards.missing():
            shards.publish(shard, vectors[shards.rows(shard)].astype(settings.stored_type))
        return Embeddings(shards)


def normal(num_rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num_rows, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
