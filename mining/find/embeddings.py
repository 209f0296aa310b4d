"""Embeddings of queries and passages: encoded by all ranks together, and read as one table.

A shard that is there already, from the trainer's evaluation, an earlier service or another number of ranks, is not
encoded again; a crash costs the shards that were being encoded.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np

from mining.ranks import Ranks
from trainer.data.datasets import RetrievalData
from trainer.encoder.missing import Texts, encode_missing
from trainer.encoder.model import Encoder, ModelSettings, load_encoder
from trainer.encoder.shards import Shards
from trainer.encoder.stream import let_go
from trainer.encoder.tokens import TokenTable, tokenize_side
from trainer.handoff.weights import Checkpoint

FEW = 1000  # embeddings that tell what they are like


class TokenCache:
    """The token tables of training queries and passages, looked for anew only when the tokenizer or its limits change.

    From checkpoint to checkpoint only the weights differ.
    """

    def __init__(self, data: RetrievalData, query_rows: np.ndarray):
        self._data, self._query_rows = data, query_rows
        self._made_for: object = None
        self._tables: list[TokenTable] = []

    def open(self, checkpoint: Checkpoint) -> tuple[Encoder, str, list[TokenTable]]:
        """Return the encoder of a checkpoint, its pooling, and the tables of queries and passages; raises InputError."""
        encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(checkpoint.encoder_folder)))
        files = checkpoint.manifest["files"].items()
        made_for = [(n, f["sha256"]) for n, f in files if n.startswith("encoder/") and not n.endswith(".safetensors")]
        if made_for != self._made_for:
            queries, passages = (tokenize_side(self._data, side, tokenizer, traits) for side in ("queries", "corpus"))
            self._tables = [queries.select(self._query_rows), passages]
            self._made_for = made_for
        return encoder, traits.pooling, self._tables


def encode_together(ranks: Ranks, texts: list[Texts], on_progress: Callable[[int, int], None]) -> None:
    """Encode what is missing, by all ranks.

    on_progress: as `encode_missing` has it. Raises NotFiniteEmbedding for a text whose embedding is not finite, and Stopped on
    every rank if one is asked to stop; what is encoded stays. Collective.
    """

    def go_on(done: int, total: int) -> None:
        on_progress(done, total)
        ranks.check_stop()

    ranks.together(lambda: encode_missing(texts, go_on, ranks.rank, ranks.num_ranks))


class Embeddings:
    """Whole shards as one table, memory-mapped. Whoever owns a shard has verified it: when it was written, or passed by."""

    def __init__(self, shards: Shards):
        self.shards = shards
        self._mapped: dict[int, np.ndarray] = {}

    def shard(self, shard: int) -> np.ndarray:
        """Return one shard, (rows, D) float32 or float16; raises TornVersion."""
        if shard not in self._mapped:
            self._mapped[shard] = self.shards.map(shard)
        return self._mapped[shard]

    def let_go(self, shard: int) -> None:
        """Take a shard's pages out of this process; they stay in the system's page cache, shared by all ranks."""
        let_go(self._mapped.get(shard))

    @cached_property
    def width(self) -> int:
        return self.shard(0).shape[1]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the embeddings of any rows, (len(rows), D) float32, in their order."""
        return self.read_stored(rows).astype(np.float32, copy=False)

    def read_stored(self, rows: np.ndarray) -> np.ndarray:
        """Return the embeddings of any rows, (len(rows), D) as they are stored, in their order."""
        embedding_nD = np.empty((len(rows), self.width), self.shards.settings.stored_type)
        shard_of_row = rows // self.shards.shard_rows
        order = np.argsort(shard_of_row, kind="stable")
        found, starts = np.unique(shard_of_row[order], return_index=True)
        for shard, here in zip(found.tolist(), np.split(order, starts)[1:], strict=True):
            embedding_nD[here] = self.shard(shard)[rows[here] - shard * self.shards.shard_rows]
            self.let_go(shard)
        return embedding_nD

    def first(self) -> np.ndarray:
        """Return the first embeddings, at most FEW, from as few shards as hold them."""
        return self.read(np.arange(min(FEW, self.shards.num_rows)))
