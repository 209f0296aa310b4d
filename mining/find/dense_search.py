"""Search with a checkpoint's embeddings: one stream over the passages, in which every shard is seen once, by one rank.

Exact search keeps the best passages of as many queries as memory holds. If there are more, the next ones are searched in another
pass over the shards, on disk by then. An approximate index sees every shard once, and answers for all queries.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mining.find.asked import Asker
from mining.find.embeddings import Embeddings
from mining.find.known_pairs import KnownPairs, Listed, PairsOf
from mining.find.retrieve import DenseRetriever
from mining.find.search import ExactFinder, Finder
from mining.find.source import Source
from mining.work import Work
from trainer.encoder.stream import Look, pass_by, stream_shards
from trainer.encoder.topk import tile_shape


class DenseSearch:
    """What the embeddings of a checkpoint find, and which rank owns which shard. All methods are collective."""

    def __init__(self, work: Work, source: Source, pairs: list[PairsOf], words: Listed | None, todo: list[slice]):
        """pairs: known before the stream. words: candidates of a search by words. todo: queries without negatives, ascending."""
        self.work, self.source, self.queries, self.passages = (
            work,
            source,
            Embeddings(source.queries),
            Embeddings(source.passages),
        )
        self.owner_of_shard = np.zeros(0, np.int32)
        self._pairs, self._words = pairs, words
        rows, _ = tile_shape(work.job.search.top_k, work.device.type)
        self._passes = cut_into_passes(todo, source.queries.num_rows, source.plan.query_pass, rows)
        self._known: KnownPairs | None = None  # of the first pass
        self._exact: ExactFinder | None = None  # of the first pass, if it is searched exactly

    def stream(self, is_exact: bool, also: list[Look]) -> None:
        """Encode the passages that are missing, and have every shard seen by whoever looks.

        is_exact: whether the first pass is searched exactly meanwhile. also: who else looks.
        """
        work, looks = self.work, list(also)
        if self._passes:
            self._known = self._open_known(self._passes[0])
            self._exact = self._open_exact(self._passes[0]) if is_exact else None
            looks += [self._known.see, *([self._exact.see] if self._exact is not None else [])]

        def see(shard: int, vectors: np.ndarray | Tensor) -> None:
            for look in looks:
                look(shard, vectors)

        def go_on(done: int, total: int) -> None:
            work.progress(done, total)
            work.ranks.check_stop()

        texts, ranks = self.source.texts.get("passage", self.source.passages), work.ranks
        self.owner_of_shard = stream_shards(texts, see, go_on, ranks.rank, ranks.num_ranks, ranks.share_all)

    def replay(self, looks: list[Look]) -> None:
        """Have every shard seen once more, from disk, by the rank that owns it."""

        def see_own() -> None:
            own = np.flatnonzero(self.owner_of_shard == self.work.ranks.rank).tolist()
            for place, (shard, vectors) in enumerate(pass_by(own, self.source.passages.map)):
                assert vectors is not None
                for look in looks:
                    look(shard, vectors)
                self.work.progress(place + 1, len(own))
                self.work.ranks.check_stop()

        self.work.ranks.together(see_own)

    def retrievers(self, finder: Finder | None = None) -> Iterator[tuple[slice, DenseRetriever]]:
        """Yield the places of each pass, and what finds the candidates of its queries.

        finder: an approximate index, which has seen all shards; None: exact search.
        """
        work, exact, known = self.work, self._exact, self._known
        self._exact = self._known = None
        asker = Asker(work.ranks, self.owner_of_shard, self.queries, self.passages, work.device)
        for places in self._passes:
            looks: list[Look] = []
            if known is None:
                known = self._open_known(places)
                looks.append(known.see)
            found: Finder | None = finder or exact
            if found is None:
                found = self._open_exact(places)
                looks.append(found.see)
            if looks:
                self.replay(looks)
            yield places, DenseRetriever(work.ranks, work.judgements, found, known, asker, work.job.search.top_k, self._words)
            known = exact = found = None  # before the next pass takes as much

    def _open_known(self, places: slice) -> KnownPairs:
        shards = self.source.passages
        return KnownPairs(places, self._stored_queries(places), self._pairs, shards.shard_rows, shards.num_rows)

    def _open_exact(self, places: slice) -> ExactFinder:
        work, shards = self.work, self.source.passages
        top_k, allowed_N = work.job.search.top_k, work.judgements.allowed_N
        return ExactFinder(places, self._stored_queries(places), top_k, shards.shard_rows, allowed_N, work.device)

    def _stored_queries(self, places: slice) -> Tensor:
        """Return the queries of a pass as they are stored, on the device."""
        return torch.from_numpy(self.queries.read_stored(np.arange(places.start, places.stop))).to(self.work.device)


def cut_into_passes(todo: list[slice], num_queries: int, most: int, tile_rows: int) -> list[slice]:
    """Return the slices of at most so many queries that are searched together: whole tiles of the search, so that the last bits
    of a score do not depend on what is to be done; none without any query to do.
    """
    if not todo:
        return []
    first, step = todo[0].start // tile_rows * tile_rows, max(1, most // tile_rows) * tile_rows
    passes = [slice(start, min(start + step, num_queries)) for start in range(first, num_queries, step)]
    return [places for places in passes if any(part.start < places.stop and places.start < part.stop for part in todo)]
