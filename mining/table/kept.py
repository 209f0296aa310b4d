"""Negatives that are drawn and not yet published: parts on disk, so that nobody holds them all and a killed service searches
only for the other queries.

A part is one rank's share of a tile, in one file that appears by one rename and carries its own digest: whole or drawn anew.
What is drawn for a query depends only on what `about` names, so a service with another number of ranks or other tiles goes on
with whatever ranges of queries are there. Files are named by their ranges, and a folder is listed once, not once a part.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from safetensors.numpy import load, save

from mining.ranks import Ranks
from trainer.errors import MachineFailed

Table = dict[str, np.ndarray]  # columns of one length

ENDING, DIGEST_BYTES = ".part", 16
READERS = 4  # threads that verify what a killed service left


class Span(NamedTuple):
    """Queries next to each other."""

    place: int  # of the first
    length: int

    @property
    def stop(self) -> int:
        return self.place + self.length


@dataclass(frozen=True)
class Part:
    """The negatives of some queries next to each other: one rank's share of a tile."""

    place: int  # of the first query
    lengths: np.ndarray  # (Q,) negatives of each
    columns: Table
    counts: dict[str, int]
    dropped: dict[str, int]  # by filter

    @property
    def span(self) -> Span:
        return Span(self.place, len(self.lengths))

    @property
    def summary(self) -> "Summary":
        sizes = {name: len(column) for name, column in self.columns.items()}
        return Summary(self.span, sizes, self.counts, self.dropped, int((self.lengths == 0).sum()))


@dataclass(frozen=True)
class Summary:
    """What is known of a part without reading it."""

    span: Span
    sizes: dict[str, int]  # numbers of each column
    counts: dict[str, int]
    dropped: dict[str, int]
    num_empty: int  # queries without negatives


@dataclass(frozen=True)
class Placed:
    """Where a part goes."""

    span: Span
    starts: dict[str, int]  # of its columns, within those of all parts


@dataclass(frozen=True)
class Drawn:
    """What was drawn for all queries: counts, and where the parts are."""

    num_queries: int
    sizes: dict[str, int]  # numbers of each column, of all ranks together: ids, scores, and the optional arrays of a version
    # candidates; queries_without, of whose candidates none passed; stayed negatives; random ones, those that a rule on scores
    # dropped and others were drawn for (redrawn), and their places left empty (unfilled)
    counts: dict[str, int]
    dropped: dict[str, int]  # by filter
    num_empty: int  # queries without negatives
    parts: list[Placed]  # this rank's
    kept: "KeptTiles"

    def read(self) -> Iterator[tuple[Placed, Part]]:
        """Yield this rank's parts, one at a time; raises MachineFailed for one that is not what was written."""
        for placed in self.parts:
            yield placed, self.kept.read(placed.span)


class TornPart(Exception):
    """A part is not what was written."""


class KeptTiles:
    """The parts of one version, in a folder of the run."""

    def __init__(self, run: Path, about: dict[str, Any]):
        """about: all that a draw depends on, as JSON."""
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
        self._all = run / "status" / "miner.tiles"
        self._folder = self._all / digest[:32]
        self._found: dict[Span, Summary] = {}  # of an earlier service, on rank 0
        self._written: dict[Span, Summary] = {}  # by this process

    def open(self) -> None:
        """Delete what was kept for other versions, or half written. Rank 0, before the others keep any."""
        for folder in self._all.glob("*"):
            if folder != self._folder:
                shutil.rmtree(folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if not path.name.endswith(ENDING):
                path.unlink(missing_ok=True)

    def missing(self, num_queries: int) -> list[slice]:
        """Return the ranges of queries that nobody has drawn, ascending; deletes parts that are torn or overlap others.

        Lists the folder once and reads each part once. Rank 0, before any is kept.
        """
        spans = self._spans()
        with ThreadPoolExecutor(READERS) as pool:
            read = dict(zip(spans, pool.map(self._summary, spans), strict=True))
        taken = disjoint([span for span, summary in read.items() if summary is not None], num_queries)
        self._found = {span: summary for span in taken if (summary := read[span]) is not None}
        for span in set(spans) - set(taken):
            self._path(span).unlink(missing_ok=True)
        edges = [0, *(edge for span in taken for edge in (span.place, span.stop)), num_queries]
        return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]

    def keep(self, part: Part) -> None:
        """Write a part; raises OSError."""
        if len(part.lengths) == 0:
            return
        span = part.span
        about = json.dumps([part.counts, part.dropped]).encode()
        columns = {f"column_{name}": np.ascontiguousarray(column) for name, column in part.columns.items()}
        data = save({**columns, "lengths": part.lengths, "about": np.frombuffer(about, np.uint8)})
        unfinished = self._folder / f"{self._path(span).name}.{os.getpid()}"
        try:
            with open(unfinished, "wb") as file:
                file.write(data)
                file.write(xxhash.xxh3_128_digest(data))
            os.replace(unfinished, self._path(span))
        except OSError:
            with contextlib.suppress(OSError):  # half a part takes room that a full disk does not have
                unfinished.unlink(missing_ok=True)
            raise
        self._written[span] = part.summary

    def read(self, span: Span) -> Part:
        """Return a part that was kept; raises MachineFailed if it is not what was written."""
        try:
            return self._read(span)
        except TornPart as torn:
            raise MachineFailed(f"the disk or file server has lost or altered {torn}; the same command draws it anew") from torn

    def gather(self, ranks: Ranks, num_queries: int) -> Drawn:
        """Return what was drawn, on every rank, once all queries are. Collective.

        Summaries travel, a few numbers a part, and no negative. A rank has the parts that it wrote, and some of those that a
        killed service left.
        """
        of_ranks = ranks.gather(self._written)

        def place() -> tuple[Summary, list[list[Placed]]]:
            owner = {span: rank for rank, written in enumerate(of_ranks) for span in written}
            known = self._found | {span: summary for written in of_ranks for span, summary in written.items()}
            taken = disjoint({*self._spans(), *owner}, num_queries)  # what others wrote may not be listed here yet
            assert sum(span.length for span in taken) == num_queries, "some queries were not drawn"
            total, placed = joined([known.get(span) or self.read(span).summary for span in taken])
            owners = [owner.get(span, number % ranks.num_ranks) for number, span in enumerate(taken)]
            return total, [[each for each, o in zip(placed, owners, strict=True) if o == r] for r in range(ranks.num_ranks)]

        total, parts = ranks.decide(place)
        return Drawn(num_queries, total.sizes, total.counts, total.dropped, total.num_empty, parts[ranks.rank], self)

    def forget(self) -> None:
        """Delete all that is kept."""
        shutil.rmtree(self._all, ignore_errors=True)

    def _spans(self) -> list[Span]:
        found = []
        for name in os.listdir(self._folder):
            with contextlib.suppress(ValueError):
                place, length = name.removesuffix(ENDING).split("-")
                found.append(Span(int(place), int(length)))
        return sorted(found)

    def _path(self, span: Span) -> Path:
        return self._folder / f"{span.place:012d}-{span.length}{ENDING}"

    def _summary(self, span: Span) -> Summary | None:
        with contextlib.suppress(TornPart):
            return self._read(span).summary
        return None

    def _read(self, span: Span) -> Part:
        try:
            data = memoryview(self._path(span).read_bytes())
            content, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
            if xxhash.xxh3_128_digest(content) != digest:
                raise TornPart(self._path(span))
            arrays = load(bytes(content))
        except OSError as error:
            raise TornPart(self._path(span)) from error
        counts, dropped = json.loads(arrays["about"].tobytes())
        columns = {name.removeprefix("column_"): array for name, array in arrays.items() if name.startswith("column_")}
        return Part(span.place, arrays["lengths"], columns, counts, dropped)


def disjoint(spans: Iterable[Span], num_queries: int) -> list[Span]:
    """Return spans of which none overlaps another, ascending: of those that do the first, and of two at one place the longer."""
    taken: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.place, -span.length)):
        if span.place >= (taken[-1].stop if taken else 0) and span.length > 0 and span.stop <= num_queries:
            taken.append(span)
    return taken


def joined(summaries: list[Summary]) -> tuple[Summary, list[Placed]]:
    """Return the summary of all parts, which stand in the order of their queries, and where each goes."""
    sizes, counts, dropped = Counter[str](), Counter[str](), Counter[str]()
    placed = []
    for each in summaries:
        placed.append(Placed(each.span, {name: sizes[name] for name in each.sizes}))
        for total, more in ((sizes, each.sizes), (counts, each.counts), (dropped, each.dropped)):
            total.update(more)
    span, num_empty = Span(0, sum(each.span.length for each in summaries)), sum(each.num_empty for each in summaries)
    return Summary(span, dict(sizes), dict(counts), dict(dropped), num_empty), placed
