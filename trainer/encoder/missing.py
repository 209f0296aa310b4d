"""Encodes what is missing of some tables' shards, each shard by one of any number of processes, and writes it behind.

The ranks of an evaluation, those of the miner, or both at once take shards by leases (see pieces.py). A faster process takes
more shards. If a process dies, only the shards that it held are lost, and others encode them. Ranks need not know of each other.
While a shard is encoded, the one before it is written, and the first batch of the next is read.
"""

import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from trainer.encoder.encode import ToHost
from trainer.encoder.pieces import Piece, Pieces, Taken, Texts
from trainer.encoder.shards import check_finite
from trainer.errors import NotFiniteEmbedding
from trainer.handoff.lease import Lease
from trainer.handoff.retry import patiently

__all__ = ["Progress", "See", "Texts", "encode_absent", "encode_missing"]

NAP_S, LONGEST_NAP_S = 0.02, 1.0  # between two looks at what others encode

Progress = Callable[[int, int], None]
See = Callable[[Texts, int, Tensor], None]


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


def encode_missing(
    texts: list[Texts], on_progress: Progress = no_progress, rank: int = 0, num_ranks: int = 1, see: See | None = None
) -> int:
    """Encode what is missing, and return when all of it is there; returns how many texts this process has encoded.

    on_progress: called after every batch and while waiting, with the number of texts known to be encoded or taken, and of all
    that were missing; what it raises ends the work. What is encoded by then stays, and what was begun is free for others.
    rank, num_ranks: of those who work together; each verifies its share of what is there, and begins at another shard.
    see: as `encode_absent` has it. Raises NotFiniteEmbedding for a text whose embedding is not finite.
    """
    for each in texts:
        there = np.setdiff1d(np.arange(each.shards.num_shards), each.shards.missing())
        for shard in there[there % num_ranks == rank]:
            each.shards.drop_torn(int(shard))
            on_progress(0, 0)
    return encode_absent(texts, on_progress, rank, num_ranks, see)


def encode_absent(
    texts: list[Texts], on_progress: Progress = no_progress, rank: int = 0, num_ranks: int = 1, see: See | None = None
) -> int:
    """Encode what is missing as `encode_missing` does, without a look at what is there.

    see: called for every shard that is there by this process, with its embeddings (rows, D) as they are stored, on the
    encoder's device; in the thread that calls, when the shard has been published, and while another one is. So, of all
    processes that ever encode at the same time, one sees a shard. It should take no longer than encoding one.
    """
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        encoding = _Encoding(Pieces(texts, rank / num_ranks, reader), on_progress, see, num_ranks, reader, writer)
        try:
            encoding.encode_all()
        finally:
            encoding.end()
    return encoding.num_encoded


class _Written(NamedTuple):
    """A shard in the hands of the writer, whose answer is whether it is there by this process."""

    piece: Piece
    embedding_nD: Tensor
    is_ours: Future[bool]


@dataclass
class _Encoding:
    """One process at work on what is missing."""

    pieces: Pieces
    on_progress: Progress
    see: See | None
    num_ranks: int
    reader: ThreadPoolExecutor
    writer: ThreadPoolExecutor
    num_here: int = 0  # texts encoded by this process, but for those that were counted as another's
    num_encoded: int = 0  # by this process
    held: list[Lease] = field(default_factory=list)  # of what is next, encoded or written at present
    ahead: Future[Taken | None] | None = None
    written: _Written | None = None

    def encode_all(self) -> None:
        """Return when every piece is there, and those of this process are seen."""
        nap_s = NAP_S
        while True:
            ahead, self.ahead = self.ahead or self.reader.submit(self._take), None
            if (taken := ahead.result()) is not None:
                self._encode(taken)
                nap_s = NAP_S
                continue
            self._see_written()
            self._tell()
            if self.pieces.are_there:
                return
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, LONGEST_NAP_S)

    def end(self) -> None:
        """Wait until the shard at work is written, and release the others for other processes."""
        try:
            if self.written is not None:
                self.written.is_ours.result()
        finally:
            if self.ahead is not None:
                self.ahead.exception()  # waits; the work has ended, for another reason
            for lease in self.held:
                lease.release()

    def _take(self) -> Taken | None:
        if (taken := self.pieces.take()) is not None:
            self.held.append(taken.lease)
        return taken

    def _look_ahead(self) -> None:
        """Have the next piece taken and its first batch read, if there are enough for everybody."""
        if self.pieces.num_free > self.num_ranks:
            self.ahead = self.reader.submit(self._take)

    def _encode(self, taken: Taken) -> None:
        piece = taken.piece

        def count(num_rows: int) -> None:
            self.num_here += 0 if taken.is_counted else num_rows
            self._renew()
            self._tell()

        embedding_nD = piece.texts.shards.embed(piece.shard, taken.batches, count, self._look_ahead)
        coming = ToHost(embedding_nD)
        self.num_encoded += piece.num_rows
        self._see_written()
        self.written = _Written(piece, embedding_nD, self.writer.submit(self._publish, piece, taken.lease, coming))

    def _publish(self, piece: Piece, lease: Lease, coming: ToHost) -> bool:
        shards, name = piece.texts.shards, secrets.token_hex(8)
        embedding_nD = coming.wait().numpy()
        try:
            check_finite(embedding_nD, piece.texts.tokens, shards.rows(piece.shard))
        except NotFiniteEmbedding as error:
            self.held.remove(lease)
            lease.fail(str(error))
            raise
        is_ours = patiently(lambda: shards.publish(piece.shard, embedding_nD, name), str(shards.folder))
        lease.release()
        self.held.remove(lease)
        return is_ours

    def _see_written(self) -> None:
        """Wait for the writer, who has one shard at a time, and show what it wrote; a disk that refuses is heard of here."""
        written, self.written = self.written, None
        if written is not None and written.is_ours.result() and self.see is not None:
            self.see(written.piece.texts, written.piece.shard, written.embedding_nD)
            self._renew()

    def _renew(self) -> None:
        for lease in list(self.held):
            lease.renew()

    def _tell(self) -> None:
        self.on_progress(self.num_here + self.pieces.num_elsewhere, self.pieces.total)
