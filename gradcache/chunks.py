"""Rows to chunks of one token budget, after a length sort.

Sorting makes the rows of a chunk nearly equally long, and a chunk also ends where its rows have become too short for it,
so hardly any padding is encoded; the budget bounds the memory of a chunk whatever the lengths are.
"""

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)
SHORTEST = 7 / 8  # of a chunk's longest row: shorter ones start the next chunk, …
SMALLEST = 1 / 8  # … once the chunk has this share of the budget, below which encoders lose speed
_told_of: set[int] = set()  # budgets that were too small for a row, so that it is said once


def plan_chunks(lengths: Tensor, max_tokens: int) -> list[Tensor]:
    """Return the rows of each chunk, (m,) int64 each, longest rows first.

    lengths: (n,) tokens of each row, on the CPU.
    max_tokens: rows times the longest row of a chunk stay within it; a single longer row is a chunk by itself, and a warning
    is logged once.
    """
    if max_tokens < 1:
        raise ValueError(f"chunk_tokens={max_tokens} must be at least 1")
    order = torch.argsort(lengths, descending=True, stable=True)
    sorted_lengths = lengths[order].tolist()
    if sorted_lengths and sorted_lengths[0] > max_tokens and max_tokens not in _told_of:
        _told_of.add(max_tokens)
        log.warning("chunk_tokens=%d is less than one text of %d tokens, which is encoded alone", max_tokens, sorted_lengths[0])
    chunks, start = [], 0
    while start < len(order):
        # The first row of a chunk is its longest, so it alone decides how many fit.
        longest = max(1, sorted_lengths[start])
        stop = min(len(order), start + max(1, max_tokens // longest))
        enough = start + max(1, int(max_tokens * SMALLEST) // longest)
        while stop > enough and sorted_lengths[stop - 1] < SHORTEST * longest:
            stop -= 1
        chunks.append(order[start:stop])
        start = stop
    return chunks


def equalize_chunks(chunks: list[Tensor], num_chunks: int) -> list[Tensor]:
    """Return the same rows in exactly `num_chunks` chunks: the largest are halved; where rows run out, empty ones follow."""
    chunks = list(chunks)
    while len(chunks) < num_chunks and (largest := max(map(len, chunks), default=0)) > 1:
        i = next(i for i, chunk in enumerate(chunks) if len(chunk) == largest)
        chunks[i : i + 1] = chunks[i].tensor_split(2)
    return chunks + [torch.empty(0, dtype=torch.int64)] * (num_chunks - len(chunks))


def unique_rows(keys: Tensor | None, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return (the first row of each distinct key, (u,); for every row its place among them, (n,)); None: all differ."""
    if keys is None:
        every = torch.arange(num_rows)
        return every, every
    distinct, place = torch.unique(keys, return_inverse=True)
    first = torch.full((len(distinct),), num_rows, dtype=torch.int64)
    first.scatter_reduce_(0, place, torch.arange(num_rows), "amin")
    return first, place
