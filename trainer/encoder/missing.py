"""Finds which shards are not encoded yet, shares them out over any number of processes, and encodes each of them once.

The ranks of an evaluation, those of the miner, or both at once take shards by leases. A faster process takes more shards. If a
process dies, only the shards that it held are lost, and others encode them. Ranks need not know of each other.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from trainer.encoder.shards import Shards
from trainer.encoder.tokens import TokenTable
from trainer.encoder.towers import Encoder
from trainer.errors import NotFiniteEmbedding
from trainer.handoff.lease import Lease, WorkFailed
from trainer.handoff.retry import patiently

NAP_S, LONGEST_NAP_S = 0.02, 1.0  # between two looks at what others encode
LISTED_S = 2.0  # how long a list of what is there is good for: with 24,000 shards it takes as long as a batch


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts, what encodes them, and where their embeddings are kept."""

    shards: Shards
    encoder: Encoder
    tokens: TokenTable


class Piece(NamedTuple):
    """One shard that is to be encoded."""

    texts: Texts
    shard: int

    @property
    def num_rows(self) -> int:
        return len(self.texts.shards.rows(self.shard))


def encode_missing(
    texts: list[Texts],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    rank: int = 0,
    num_ranks: int = 1,
) -> int:
    """Encode what is missing, and return when all of it is there; returns how many texts this process has encoded.

    on_progress: called after every batch and while waiting, with the number of texts known to be encoded or taken, and of all
    that were missing; what it raises ends the work. What is encoded by then stays, and what was begun is free for others.
    rank, num_ranks: of those who work together; each verifies its share of what is there, and begins at another shard.
    A shard is written while the next one is encoded. Raises NotFiniteEmbedding for a text whose embedding is not finite.
    """
    _drop_torn(texts, on_progress, rank, num_ranks)
    pieces = [Piece(each, shard) for each in texts for shard in each.shards.missing()]
    begin = len(pieces) * rank // num_ranks
    with ThreadPoolExecutor(1) as writer:
        encoding = _Encoding(on_progress, sum(piece.num_rows for piece in pieces), writer)
        try:
            encoding.encode_all([*pieces[begin:], *pieces[:begin]])
        finally:
            encoding.end()
    return encoding.num_encoded


def _drop_torn(texts: list[Texts], on_progress: Callable[[int, int], None], rank: int, num_ranks: int) -> None:
    """Delete what does not verify of this rank's share."""
    for each in texts:
        there = np.setdiff1d(np.arange(each.shards.num_shards), each.shards.missing())
        for shard in there[there % num_ranks == rank]:
            each.shards.drop_torn(int(shard))
            on_progress(0, 0)


@dataclass
class _Encoding:
    """One process at work on what is missing."""

    on_progress: Callable[[int, int], None]
    total: int
    writer: ThreadPoolExecutor
    done: int = 0  # texts encoded or taken, by whomever
    num_encoded: int = 0  # by this process
    counted: set[Piece] = field(default_factory=set)  # in `done`
    held: list[Lease] = field(default_factory=list)  # of what is encoded or written at present
    written: Future[None] | None = None

    def encode_all(self, pieces: list[Piece]) -> None:
        """Return when every piece is there, or in the writer's hands."""
        nap_s = NAP_S
        while pieces := self._missing(pieces):
            encoded = self._encode_free(pieces)
            pieces = [piece for piece in pieces if piece not in encoded]
            nap_s = NAP_S if encoded else min(2 * nap_s, LONGEST_NAP_S)
            if not encoded:
                self.on_progress(self.done, self.total)
                time.sleep(nap_s)
        self.on_progress(self.done, self.total)

    def end(self) -> None:
        """Wait until the shards at work are written, and release the others for other processes."""
        try:
            self._wait_for_writer()
        finally:
            for lease in self.held:
                lease.release()

    def _missing(self, pieces: list[Piece]) -> list[Piece]:
        """Return the pieces that are missing, those without a lease first; lists each folder once."""
        found = {texts: texts.shards.missing_and_leased() for texts in {piece.texts for piece in pieces}}
        left = []
        for piece in pieces:
            missing, leased = found[piece.texts]
            if piece.shard not in missing or piece.shard in leased:
                self._count(piece)
            if piece.shard in missing:
                left.append((piece.shard in leased, piece))
        return [piece for _, piece in sorted(left, key=lambda item: item[0])]

    def _encode_free(self, pieces: list[Piece]) -> set[Piece]:
        """Encode the pieces whose lease is free, until the list is out of date; return these pieces."""
        encoded: set[Piece] = set()
        until = time.monotonic() + LISTED_S
        for piece in pieces:
            is_held = piece in self.counted
            lease = self._take(piece)
            if lease is not None:
                self._encode(piece, lease)
                encoded.add(piece)
            # Of the shards that others hold, only one is asked for at a time: this process has to wait for them anyway, and the
            # holder may be dead.
            if is_held or time.monotonic() > until:
                break
        return encoded

    def _take(self, piece: Piece) -> Lease | None:
        """Return the lease of a piece that is still missing, or None."""
        shards, shard = piece.texts.shards, piece.shard
        if shards.is_there(shard):
            return None
        try:
            lease = shards.lease(shard)
        except WorkFailed as failed:
            raise NotFiniteEmbedding(str(failed)) from failed
        if lease is not None and shards.is_there(shard):  # its holder published it, and let go, just now
            lease.release()
            return None
        return lease

    def _encode(self, piece: Piece, lease: Lease) -> None:
        self.held.append(lease)
        is_counted = piece in self.counted  # as another's
        self.counted.add(piece)

        def count(num_rows: int) -> None:
            self.done += 0 if is_counted else num_rows
            lease.renew()
            self.on_progress(self.done, self.total)

        try:
            embedding_nD = piece.texts.shards.embed(piece.shard, piece.texts.encoder, piece.texts.tokens, count)
        except NotFiniteEmbedding as error:
            self.held.remove(lease)
            lease.fail(str(error))
            raise
        self.num_encoded += piece.num_rows
        self._wait_for_writer()  # one at a time: a disk that refuses it for good is heard of here
        self.written = self.writer.submit(self._publish, piece, lease, embedding_nD)

    def _publish(self, piece: Piece, lease: Lease, embedding_nD: np.ndarray) -> None:
        shards = piece.texts.shards
        patiently(lambda: shards.publish(piece.shard, embedding_nD), str(shards.folder))
        lease.release()
        self.held.remove(lease)

    def _wait_for_writer(self) -> None:
        if self.written is not None:
            self.written.result()

    def _count(self, piece: Piece) -> None:
        if piece not in self.counted:
            self.counted.add(piece)
            self.done += piece.num_rows
