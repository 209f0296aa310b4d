"""Embeddings of queries and passages, shard by shard, leased to the ranks: who is faster takes more.

A shard that is there already, from the trainer's evaluation, an earlier service or another number of ranks, is not
encoded again; a crash costs the shards that were being encoded.
"""

import mmap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mining.ranks import Ranks
from trainer.data.datasets import RetrievalData
from trainer.encoder.model import Encoder, ModelSettings, load_encoder
from trainer.encoder.shards import Shards, drop_torn
from trainer.encoder.tokens import TokenTable, tokenize_side
from trainer.encoder.towers import Side as Tower
from trainer.handoff.weights import Checkpoint


@dataclass(frozen=True)
class Side:
    """Texts that one of the towers encodes."""

    tower: Tower
    shards: Shards
    tokens: TokenTable


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


def encode_missing(ranks: Ranks, encoder: Encoder, sides: list[Side], on_progress: Callable[[int, int], None]) -> int:
    """Encode the shards that are not there; return how many texts were missing over all ranks.

    on_progress: called with the number of texts known to be encoded or taken, and of all that were missing.
    A shard is written while the next one is encoded. Raises NotFiniteEmbedding for a text whose embedding is not finite, and
    Stopped on every rank if one is asked to stop; what is encoded stays. Collective.
    """
    # Rank 0's list: others, the trainer's evaluation among them, may add shards at any moment.
    missing = ranks.decide(lambda: _missing(sides))
    sizes = [len(sides[side].shards.rows(shard)) for side, shard in missing]

    def encode_mine() -> None:
        written: Future[None] | None = None
        with ThreadPoolExecutor(1) as writer:
            for number, (place, shard) in enumerate(missing):
                side = sides[place]
                if not side.shards.lease(shard):
                    continue
                done = sum(sizes[:number])

                def count(num_rows: int) -> None:
                    nonlocal done
                    done += num_rows
                    on_progress(done, sum(sizes))
                    ranks.check_stop()

                embedding_nD = side.shards.embed(shard, encoder.side(side.tower), side.tokens, count)
                if written is not None:
                    written.result()  # one at a time: a full disk is heard of here
                written = writer.submit(side.shards.publish, shard, embedding_nD)
            if written is not None:
                written.result()

    ranks.together(encode_mine)
    if ranks.speaks:
        for side in sides:
            side.shards.end_leases()
    return sum(sizes)


def _missing(sides: list[Side]) -> list[tuple[int, int]]:
    for side in sides:
        drop_torn(side.shards)
        side.shards.end_leases()
    return [(place, shard) for place, side in enumerate(sides) for shard in side.shards.missing()]


class Embeddings:
    """Whole shards as one table, memory-mapped; each is verified when it is first read."""

    def __init__(self, shards: Shards):
        self.shards = shards
        self._mapped: dict[int, np.ndarray] = {}

    def shard(self, shard: int) -> np.ndarray:
        """Return one shard, (rows, D) float32 or float16; raises TornVersion."""
        if shard not in self._mapped:
            self._mapped[shard] = self.shards.read(shard)
        return self._mapped[shard]

    def let_go(self, shard: int) -> None:
        """Take a shard's pages out of this process; they stay in the system's page cache, shared by all ranks."""
        mapped = getattr(self._mapped.get(shard), "_mmap", None)
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED)

    @cached_property
    def width(self) -> int:
        return self.shard(0).shape[1]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the embeddings of any rows, (len(rows), D) float32, in their order."""
        embedding_nD = np.empty((len(rows), self.width), np.float32)
        shard_of_row = rows // self.shards.shard_rows
        for shard in np.unique(shard_of_row):
            here = shard_of_row == shard
            embedding_nD[here] = self.shard(int(shard))[rows[here] - shard * self.shards.shard_rows]
            self.let_go(int(shard))
        return embedding_nD
