"""Puts the parts of all ranks together into one version on disk.

Rank 0 makes the files in full size, every rank writes the rows of its parts at their places, the blocks of the files are then
hashed by all ranks, each block once, and rank 0 writes the manifest and renames the whole once. No negative passes through a
message, a rank holds one part at a time, and a process that is killed leaves a staging folder that the next service deletes.
"""

import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mining.ranks import Ranks
from mining.table.kept import Drawn
from trainer.handoff.arrays import ArrayWriter
from trainer.handoff.digests import BLOCK_BYTES, describe_blocks, hash_blocks, num_blocks
from trainer.handoff.manifest import seal, stage, staging_place, write_latest
from trainer.handoff.negatives import create_negatives, negatives_folder, version_name
from trainer.handoff.retry import patiently


def assemble(
    ranks: Ranks,
    run: Path,
    version: int,
    drawn: Drawn,
    fields: dict[str, Any],
    may_publish: Callable[[], None],
    clusters: np.ndarray | None = None,
) -> dict[str, Any]:
    """Publish a version whole, point LATEST at it, and return its manifest on every rank. Collective.

    fields, may_publish: as `publish_negatives` has them.
    clusters: (Q,) int64 on rank 0; None: none.
    An error of one rank is raised by all, and nothing half-written stays behind.
    """
    folder, what = negatives_folder(run) / version_name(version), f"negatives v{version}"
    lengths = {"indptr": drawn.num_queries + 1, **drawn.sizes}
    if clusters is not None:
        lengths["clusters"] = len(clusters)

    def create() -> tuple[Path, dict[str, int]]:
        staging = stage(folder)
        create_negatives(staging, lengths)
        return staging, lengths

    try:
        staging, lengths = ranks.decide(lambda: patiently(create, what))
        ranks.together(lambda: patiently(lambda: _write(staging, lengths, drawn, clusters, ranks), what))
        files = hash_together(ranks, staging)
        manifest = {"version": version, "num_queries": drawn.num_queries, **fields, "files": files}
        return ranks.decide(lambda: _publish(staging, folder, manifest, may_publish, what))
    finally:
        if ranks.speaks:
            shutil.rmtree(staging_place(folder), ignore_errors=True)


def hash_together(ranks: Ranks, staging: Path) -> dict[str, Any]:
    """Return the entries of all staged files, on every rank; each block is hashed by one rank. Collective."""
    sizes = ranks.decide(lambda: {path.name: path.stat().st_size for path in sorted(staging.iterdir())})
    blocks = [(name, block) for name, size in sizes.items() for block in range(num_blocks(size))]
    first, stop = (len(blocks) * r // ranks.num_ranks for r in (ranks.rank, ranks.rank + 1))

    def hash_own() -> list[str]:
        found = []
        for name, own in groupby(blocks[first:stop], key=lambda each: each[0]):
            numbers = [block for _, block in own]
            found += hash_blocks(staging / name, range(numbers[0], numbers[-1] + 1), BLOCK_BYTES)
        return found

    of_ranks = ranks.gather(ranks.together(hash_own))

    def describe() -> dict[str, Any]:
        digests = iter([digest for of_rank in of_ranks for digest in of_rank])
        return {name: describe_blocks(size, [next(digests) for _ in range(num_blocks(size))]) for name, size in sizes.items()}

    return ranks.decide(describe)


def _write(staging: Path, lengths: dict[str, int], drawn: Drawn, clusters: np.ndarray | None, ranks: Ranks) -> None:
    """Write this rank's parts; of indptr where each query's row ends, and rank 0 where the first begins."""
    with ArrayWriter(staging, lengths, is_shared=ranks.num_ranks > 1) as writer:
        for placed, part in drawn.read():
            writer.write("indptr", placed.span.place + 1, placed.starts["ids"] + np.cumsum(part.lengths))
            for name, column in part.columns.items():
                writer.write(name, placed.starts[name], column)
        if ranks.speaks:
            writer.write("indptr", 0, np.zeros(1, np.int64))
            if clusters is not None:
                writer.write("clusters", 0, clusters)


def _publish(staging: Path, folder: Path, manifest: dict[str, Any], may_publish: Callable[[], None], what: str) -> dict[str, Any]:
    there = patiently(lambda: seal(staging, folder, manifest, may_publish), what)
    may_publish()
    patiently(lambda: write_latest(folder.parent, folder.name), what)
    return there
