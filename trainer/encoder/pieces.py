"""The shards that are to be encoded, of which a process takes one after the other by leases.

A lease is held while a shard is encoded and written. Whoever works on the same shards, on any machine and for any purpose,
takes others; if a process dies, what it held is taken by somebody else.
"""

import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple

from trainer.encoder.encode import Batches
from trainer.encoder.shards import Shards
from trainer.encoder.tokens import TokenTable
from trainer.encoder.towers import Encoder
from trainer.errors import NotFiniteEmbedding
from trainer.handoff.lease import Lease, WorkFailed

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


Listed = dict[Texts, tuple[set[int], set[int]]]


class Taken(NamedTuple):
    """A piece that this process has to encode, its first batch read."""

    piece: Piece
    lease: Lease
    batches: Batches
    is_counted: bool  # as another's, who held it before


class Pieces:
    """What is missing. One thread at a time may take a piece."""

    def __init__(self, texts: Iterable[Texts], begin: float, reader: Executor):
        """begin: the share of the pieces that this process leaves for the end. reader: as `Batches` has it."""
        listed = _list(texts)
        pieces = [Piece(each, shard) for each, (missing, _) in listed.items() for shard in sorted(missing)]
        first = int(len(pieces) * begin)
        self._left = dict.fromkeys([*pieces[first:], *pieces[:first]])  # not known to be there, nor taken by this process
        self.total = sum(piece.num_rows for piece in pieces)
        self.num_elsewhere = 0  # texts that others have encoded or taken
        self._counted: set[Piece] = set()  # in num_elsewhere
        self._reader = reader
        self._free, self._held = deque[Piece](), deque[Piece]()  # what is left, by the last list
        self._listed_at = 0.0
        self._sort(listed)

    @property
    def are_there(self) -> bool:
        """Whether all is there but what this process has taken, as far as it knows."""
        return not self._left

    @property
    def num_free(self) -> int:
        """How many pieces, about, nobody has taken yet."""
        return len(self._free)

    def take(self) -> Taken | None:
        """Take the next piece that is free and read its first batch; None: others hold what is left, or nothing is."""
        if not (self._free or self._held) or time.monotonic() > self._listed_at + LISTED_S:
            self._sort(_list({piece.texts for piece in self._left}))
        while self._free:
            if (taken := self._taken(self._free.popleft())) is not None:
                return taken
        # Of the pieces that others hold, only one is asked for at a time: this process has to wait for them anyway, and the
        # holder may be dead.
        held, self._held = self._held, deque()
        return self._taken(held[0]) if held else None

    def _sort(self, listed: Listed) -> None:
        """Note what is left, and what of it is free."""
        self._free, self._held, self._listed_at = deque(), deque(), time.monotonic()
        for piece in list(self._left):
            missing, leased = listed[piece.texts]
            is_missing, is_held = piece.shard in missing, piece.shard in leased
            if not is_missing:
                del self._left[piece]
            else:
                (self._held if is_held else self._free).append(piece)
            if piece not in self._counted and (is_held or not is_missing):
                self._counted.add(piece)
                self.num_elsewhere += piece.num_rows

    def _taken(self, piece: Piece) -> Taken | None:
        """Return a piece with its lease and its first batch, or None if it is there or held."""
        if (lease := _lease(piece)) is None:
            return None
        del self._left[piece]
        try:
            batches = piece.texts.shards.batches(piece.shard, piece.texts.encoder, piece.texts.tokens, self._reader)
        except BaseException:
            lease.release()
            raise
        return Taken(piece, lease, batches, piece in self._counted)


def _list(texts: Iterable[Texts]) -> Listed:
    """Return what is missing and what is leased of each; lists each folder once."""
    return {each: each.shards.missing_and_leased() for each in texts}


def _lease(piece: Piece) -> Lease | None:
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
