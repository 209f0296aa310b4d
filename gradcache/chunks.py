"""Rows to chunks of one token budget, after a length sort.

Sorting makes the rows of a chunk nearly equally long, and a chunk also ends where its rows have become too short for it,
so hardly any padding is encoded; the budget bounds the memory of a chunk whatever the lengths are.
Packed rows need no padding at all: their chunks are of nearly equally many tokens.
"""

import itertools
import logging
from bisect import bisect_left, bisect_right

import torch
from torch import Tensor

log = logging.getLogger(__name__)
SHORTEST = 7 / 8  # of a chunk's longest row: shorter ones start the next chunk, …
SMALLEST = 1 / 8  # … once the chunk has this share of the budget, below which encoders lose speed
_told_of: set[int] = set()  # budgets that were too small for a row, so that it is said once


def plan_chunks(lengths: Tensor, max_tokens: int, is_packed: bool = False) -> list[Tensor]:
    """Return the rows of each chunk, (m,) int64 each, longest rows first.

    lengths: (n,) tokens of each row, on the CPU.
    max_tokens: rows times the longest row of a chunk stay within it, of packed rows the sum of their lengths; a single longer
    row is a chunk by itself, and a warning is logged once.
    """
    if max_tokens < 1:
        raise ValueError(f"chunk_tokens={max_tokens} must be at least 1")
    order = torch.argsort(lengths, descending=True, stable=True)
    sorted_lengths = lengths[order].tolist()
    if sorted_lengths and sorted_lengths[0] > max_tokens and max_tokens not in _told_of:
        _told_of.add(max_tokens)
        log.warning("chunk_tokens=%d is less than one text of %d tokens, which is encoded alone", max_tokens, sorted_lengths[0])
    edges = (_even_edges if is_packed else _padded_edges)(sorted_lengths, max_tokens)
    return [order[start:stop] for start, stop in itertools.pairwise(edges)]


def _padded_edges(lengths: list[int], max_tokens: int) -> list[int]:
    """Return where chunks of padded rows begin and end; lengths: descending."""
    edges = [0]
    while (start := edges[-1]) < len(lengths):
        # The first row of a chunk is its longest, so it alone decides how many fit.
        longest = max(1, lengths[start])
        stop = min(len(lengths), start + max(1, max_tokens // longest))
        enough = start + max(1, int(max_tokens * SMALLEST) // longest)
        while stop > enough and lengths[stop - 1] < SHORTEST * longest:
            stop -= 1
        edges.append(stop)
    return edges


def _even_edges(lengths: list[int], max_tokens: int) -> list[int]:
    """Return where chunks of packed rows begin and end: the fewest that fit, each with its share of the tokens that are left."""
    ends = [0, *itertools.accumulate(lengths)]  # tokens before each row
    fewest = [0]
    while fewest[-1] < len(lengths):
        fewest.append(_last_that_fits(ends, fewest[-1], max_tokens))
    edges = [0]
    while (start := edges[-1]) < len(lengths):
        share = (ends[-1] - ends[start]) / max(1, len(fewest) - len(edges))
        reached = bisect_left(ends, ends[start] + share, lo=start + 1)
        edges.append(max(start + 1, min(reached, _last_that_fits(ends, start, max_tokens))))
    return edges


def _last_that_fits(ends: list[int], start: int, max_tokens: int) -> int:
    return max(start + 1, bisect_right(ends, ends[start] + max_tokens) - 1)


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
