"""A corpus in memory whose texts repeat, in shards, and finders that see parts of it as ranks do."""

import numpy as np
import torch

from mining.find.approximate import ApproximateFinder
from mining.find.entries import Entries
from mining.find.rates import clustered
from mining.find.trained import train_index
from trainer.encoder.topk import BestOf, best_of_keys

NUM_PASSAGES, NUM_QUERIES, WIDTH, SHARD_ROWS = 2000, 300, 24, 128  # nothing divides; two batches of queries, the second of 44
NUM_TEXTS = 1500
DEVICE = torch.device("cpu")


class Table:
    """Embeddings in memory, as a finder reads those of queries."""

    def __init__(self, embedding_QD: np.ndarray):
        self.embedding_QD, self.shards, self.num_rows = embedding_QD, self, len(embedding_QD)

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.embedding_QD[rows]


class Corpus:
    """Passages of which a quarter repeat others, a few texts very often, and some of which may not be found."""

    def __init__(self, num_texts: int = NUM_TEXTS):
        draw = np.random.default_rng(3)
        self.key_N = draw.permutation(
            np.concatenate([np.arange(num_texts), draw.zipf(1.3, NUM_PASSAGES - num_texts) % num_texts])
        )
        self.passage_ND = clustered(num_texts, WIDTH, num_clusters=40)[self.key_N]
        self.allowed_N = draw.random(NUM_PASSAGES) < 0.95
        self.queries = Table(clustered(NUM_QUERIES, WIDTH, seed=1, num_clusters=40))
        self.entries = Entries(self.allowed_N, self.key_N)
        self.num_shards = -(-NUM_PASSAGES // SHARD_ROWS)

    def train(self, factory: str):
        return train_index(factory, self.passage_ND[self.entries.is_entry_N], DEVICE)

    def exact(self, k: int) -> np.ndarray:
        best = BestOf(self.queries.embedding_QD, k)
        best.look_at(self.passage_ND, np.flatnonzero(self.allowed_N))
        return best_of_keys([best.keys()], k)[1]

    def finder(self, factory: str, index, k: int, nprobe: int, shards, entries: Entries | None = None) -> ApproximateFinder:
        """Return a finder that has seen some shards, in that order, every other as a tensor."""
        found = ApproximateFinder(factory, index, entries or self.entries, self.queries, k, SHARD_ROWS, DEVICE)
        for shard in shards:
            vectors = self.passage_ND[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
            found.see(shard, torch.from_numpy(vectors) if shard % 2 else vectors)
        found.set_nprobe(nprobe)
        return found

    def shares(self, num_ranks: int, seed: int) -> list[np.ndarray]:
        """Return each rank's shards, in an order of its own."""
        order = np.random.default_rng(seed).permutation(self.num_shards)
        return [order[rank::num_ranks] for rank in range(num_ranks)]
