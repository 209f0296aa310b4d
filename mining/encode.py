"""Embeddings of queries and passages, shard by shard, dealt out over the ranks.

A shard that is there already, from the trainer's evaluation, an earlier service or another number of ranks, is not
encoded again; a crash costs the shards that were being encoded.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from mining.ranks import Ranks
from trainer.data.datasets import RetrievalData
from trainer.encoder.model import Encoder, ModelSettings, load_encoder
from trainer.encoder.shards import Shards, drop_torn, open_shards
from trainer.encoder.tokens import TokenTable, tokenize_side
from trainer.encoder.towers import SIDES
from trainer.handoff.weights import Checkpoint

Side = tuple[Shards, TokenTable]


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


def open_sides(run: Path, checkpoint: Checkpoint, encoder: Encoder, pooling: str, tables: list[TokenTable]) -> list[Side]:
    """Return the shards of queries and of passages under a checkpoint's weights, each with its tokens."""
    digest = checkpoint.manifest["weights_digest"]
    return [
        (open_shards(run / "shards", digest, pooling, tokens, encoder.part(side)), tokens)
        for side, tokens in zip(SIDES, tables, strict=True)
    ]


def encode_missing(ranks: Ranks, encoder: Encoder, sides: list[Side], on_progress: Callable[[int, int], None]) -> int:
    """Encode the shards that are not there; return how many texts were missing over all ranks.

    on_progress: called with the number of texts encoded by this rank, and of all that fall to it.
    Raises Stopped on every rank if one is asked to stop; what is encoded stays. Collective.
    """
    # Rank 0's list: others, the trainer's evaluation among them, may add shards at any moment.
    missing = ranks.decide(lambda: _missing(sides))

    def encode_mine() -> None:
        mine = missing[ranks.rank :: ranks.num_ranks]
        total, done = sum(len(sides[side][0].rows(shard)) for side, shard in mine), 0

        def count(num_rows: int) -> None:
            nonlocal done
            done += num_rows
            on_progress(done, total)
            ranks.check_stop()

        for side, shard in mine:
            shards, tokens = sides[side]
            shards.encode(shard, encoder.side(SIDES[side]), tokens, count)

    ranks.together(encode_mine)
    return sum(len(sides[side][0].rows(shard)) for side, shard in missing)


def _missing(sides: list[Side]) -> list[tuple[int, int]]:
    for shards, _ in sides:
        drop_torn(shards)
    return [(side, shard) for side, (shards, _) in enumerate(sides) for shard in shards.missing()]


class Embeddings:
    """Whole shards as one table, memory-mapped; each is verified when it is first read."""

    def __init__(self, shards: Shards):
        self.shards = shards
        self._mapped: dict[int, np.ndarray] = {}

    def shard(self, shard: int) -> np.ndarray:
        """Return one shard, (rows, D) float32; raises TornVersion."""
        if shard not in self._mapped:
            self._mapped[shard] = self.shards.read(shard)
        return self._mapped[shard]

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
        return embedding_nD
