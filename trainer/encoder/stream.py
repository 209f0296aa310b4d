"""Every shard of a table, seen once by one of some ranks: from disk where it is there, else as soon as it has been encoded.

So what looks at all embeddings, a search or an index, does so while they are made, and needs none of them afterwards. Whoever
is killed starts again from what is on disk, with any number of ranks. Other processes, such as an evaluation, may encode the
same shards at the same time: theirs are seen from disk when they are there.
"""

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from trainer.encoder.missing import Progress, Texts, encode_absent, no_progress
from trainer.encoder.shards import Shards
from trainer.errors import MachineFailed
from trainer.handoff.manifest import TornVersion

T = TypeVar("T", bound=np.ndarray | None)
Look = Callable[[int, "np.ndarray | Tensor"], None]  # shard, its embeddings (rows, D) as stored
Together = Callable[[Callable[[], np.ndarray]], list[np.ndarray]]


def alone(work: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """Do some work where there is one rank."""
    return [work()]


def stream_shards(
    source: Texts | Shards,
    see: Look,
    on_progress: Progress = no_progress,
    rank: int = 0,
    num_ranks: int = 1,
    together: Together = alone,
) -> np.ndarray:
    """Have every shard seen by one rank, and return which rank it was, (num_shards,) int32, the same on every rank.

    source: Shards alone are all on disk, and none is encoded; raises TornVersion if one is not whole.
    see: called in this thread; a shard that has been encoded is a tensor on the encoder's device, one that was on disk is a
    memory-mapped array, whose pages are let go afterwards. All have been published by then, and verified.
    on_progress: called with the texts that are seen or encoded, about, and all of the table; what it raises ends the work.
    together: does this rank's work and returns what that of every rank has returned, in the order of ranks; it lets all leave
    if one raises. Collective as `together` is; the number of calls is the same on every rank.
    """
    stream = _Stream(source, see, on_progress, rank, num_ranks)
    owner_of_shard = np.full(stream.shards.num_shards, -1, np.int32)
    there = together(stream.there)[0]  # ranks that list the folder by themselves may find different shards
    while (owner_of_shard < 0).any():
        num_seen = stream.num_rows(owner_of_shard >= 0)
        for owner, seen in enumerate(together(functools.partial(stream.see_all, there, num_seen))):
            _own(owner_of_shard, owner, seen)
        there = np.flatnonzero(owner_of_shard < 0)  # other processes have encoded these
    return owner_of_shard


def pass_by(shards: Iterable[int], read: Callable[[int], T]) -> Iterator[tuple[int, T]]:
    """Yield (shard, what `read` returns of it); the next is read by a thread meanwhile, and the pages of the last are let go.

    read: `Shards.read`, or `Shards.map` where they have been verified.
    """
    waiting = iter(shards)
    with ThreadPoolExecutor(1) as reader:

        def start() -> tuple[int, Future[T]] | None:
            return None if (shard := next(waiting, None)) is None else (shard, reader.submit(_read_in, read, shard))

        ahead = start()
        while ahead is not None:
            (shard, coming), ahead = ahead, None
            embedding_nD = coming.result()
            ahead = start()
            yield shard, embedding_nD
            let_go(embedding_nD)


def let_go(embedding_nD: np.ndarray | None) -> None:
    """Take a map's pages out of this process; they stay in the system's page cache, shared by all."""
    mapped = getattr(embedding_nD, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def return_freed_memory() -> None:
    """Give the pages of what is freed back to the system, where the C library is glibc.

    It keeps blocks of the size of a shard, and in the gaps between them the process grows with the number of shards. What comes
    back is cleared anew, some tens of milliseconds for a shard, which takes a second to search and minutes to encode.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _read_in(read: Callable[[int], T], shard: int) -> T:
    embedding_nD = read(shard)
    mapped = getattr(embedding_nD, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_WILLNEED)
    return embedding_nD


@dataclass
class _Stream:
    """What one rank sees of a table."""

    source: Texts | Shards
    see: Look
    on_progress: Progress
    rank: int
    num_ranks: int

    @property
    def shards(self) -> Shards:
        return self.source if isinstance(self.source, Shards) else self.source.shards

    def there(self) -> np.ndarray:
        """Return the shards that are on disk."""
        if isinstance(self.source, Shards):
            return np.arange(self.shards.num_shards)
        return np.setdiff1d(np.arange(self.shards.num_shards), self.shards.missing())

    def num_rows(self, shards: np.ndarray) -> int:
        """Return how many texts some shards hold, which are given as numbers or as a mask."""
        starts = np.arange(self.shards.num_shards)[shards] * self.shards.shard_rows
        return int(np.minimum(self.shards.shard_rows, self.shards.num_rows - starts).sum())

    def see_all(self, there: np.ndarray, num_seen: int) -> np.ndarray:
        """See this rank's part of what is there, and of what is missing what it encodes; return the shards that were seen.

        num_seen: texts whose shards have been seen before.
        """
        seen: list[int] = []

        def look(shard: int, embedding_nD: np.ndarray | Tensor) -> None:
            self.see(shard, embedding_nD)
            seen.append(shard)
            return_freed_memory()

        for place, (shard, embedding_nD) in enumerate(pass_by(there[self.rank :: self.num_ranks].tolist(), self._read)):
            if embedding_nD is not None:
                look(shard, embedding_nD)
            others = there[: (place + 1) * self.num_ranks]  # are about as far as this one
            self.on_progress(num_seen + self.num_rows(others), self.shards.num_rows)
        if isinstance(self.source, Texts):
            total = self.shards.num_rows

            def tell(done: int, missing: int) -> None:
                self.on_progress(total - missing + done, total)

            encode_absent([self.source], tell, self.rank, self.num_ranks, lambda _, *shard: look(*shard))
        return np.array(seen, np.int64)

    def _read(self, shard: int) -> np.ndarray | None:
        """Return a shard's verified embeddings; None: it was torn, and is missing now."""
        try:
            return self.shards.read(shard)
        except TornVersion:
            if isinstance(self.source, Shards):
                raise
            self.shards.drop_torn(shard)
            return None


def _own(owner_of_shard: np.ndarray, owner: int, seen: np.ndarray) -> None:
    """Note who has seen some shards; raises MachineFailed if another one has, after which only a new start is right."""
    if (twice := seen[owner_of_shard[seen] >= 0]).size:
        raise MachineFailed(f"shard {twice[0]} was lost on disk after a rank had seen it, and encoded again; start again")
    owner_of_shard[seen] = owner
