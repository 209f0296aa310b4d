"""What a manifest says of a file, and whether it is so.

An entry is {"bytes", "sha256"}, for what people load or check with other tools, or {"bytes", "block_bytes", "xxh3_128": [...]},
for what only negpool reads: one digest for each block, so that several processes share the hashing of a large file, a reader
checks blocks in threads, and damage is named to a block. xxh3 finds accidents, at the speed of memory; who can alter a file on
purpose can alter its manifest as well.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import xxhash

Digest = Literal["sha256", "xxh3_128"]

BLOCK_BYTES = 1 << 26  # 64 MiB: some thousand digests for 100 GB, and enough blocks to share
READ_BYTES = 1 << 18  # at once: what is hashed fits into a core's cache
MAX_THREADS = 4  # of one process: a node's other ranks hash, too


def describe_file(path: Path, digest: Digest = "sha256") -> dict[str, Any]:
    """Return the entry of a file."""
    size = path.stat().st_size
    if digest == "sha256":
        with open(path, "rb") as file:
            return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return describe_blocks(size, hash_blocks(path, range(num_blocks(size)), BLOCK_BYTES))


def describe_blocks(size: int, digests: list[str]) -> dict[str, Any]:
    """Return the entry of a file of so many bytes whose blocks were hashed, in order."""
    return {"bytes": size, "block_bytes": BLOCK_BYTES, "xxh3_128": digests}


def num_blocks(size: int) -> int:
    """Return how many blocks a file of so many bytes has."""
    return -(-size // BLOCK_BYTES)


def hash_blocks(path: Path, blocks: range, block_bytes: int) -> list[str]:
    """Return the digests of some blocks of a file, in order; in several threads where there are several blocks."""
    if len(blocks) < 2:
        return [_hash_block(path, block, block_bytes) for block in blocks]
    with ThreadPoolExecutor(min(MAX_THREADS, len(blocks), os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda block: _hash_block(path, block, block_bytes), blocks))


def what_differs(path: Path, entry: dict[str, Any]) -> str | None:
    """Return in words what a file is instead of what its entry says, or None if it is that. Raises OSError."""
    size = path.stat().st_size
    if size != entry.get("bytes"):
        return f"{size} bytes instead of {entry.get('bytes')}"
    if "sha256" in entry:
        actual = describe_file(path)["sha256"]
        return None if actual == entry["sha256"] else f"SHA-256 {actual[:12]}… instead of {entry['sha256'][:12]}…"
    return next(_wrong_blocks(path, size, entry), None)


def _wrong_blocks(path: Path, size: int, entry: dict[str, Any]) -> Iterator[str]:
    try:
        block_bytes, expected = int(entry["block_bytes"]), list(entry["xxh3_128"])
        blocks = range(-(-size // block_bytes))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        yield "no digest that this version of negpool knows"
        return
    if len(blocks) != len(expected):
        yield f"{len(blocks)} blocks of {block_bytes} bytes instead of {len(expected)}"
    for block, (actual, wanted) in enumerate(zip(hash_blocks(path, blocks, block_bytes), expected, strict=False)):
        if actual != wanted:
            yield f"xxh3-128 {actual[:12]}… in its block {block} instead of {str(wanted)[:12]}…"


def _hash_block(path: Path, block: int, block_bytes: int) -> str:
    digest, left = xxhash.xxh3_128(), block_bytes
    with open(path, "rb", buffering=0) as file:
        file.seek(block * block_bytes)
        while left and (piece := file.read(min(left, READ_BYTES))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()
