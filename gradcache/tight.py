"""What is done when a chunk does not fit into memory: half as many rows at once, or its graph in the host's memory.

Before the loss any chunk may be halved. After the loss a chunk has to draw the same dropout as before, so only a chunk without
random draws may be halved; the graph of any other chunk is kept in the host's memory until its backward.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcache.plan import Chunk, encode_chunk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """A chunk and its embeddings."""

    chunk: Chunk
    embedding_mD: Tensor
    with_graph: bool


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an allocation failed, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory(chunk: Chunk) -> torch.OutOfMemoryError:
    """Return the error that ends the step."""
    tokens = chunk.num_padded_tokens
    return torch.OutOfMemoryError(f"a chunk of {tokens} padded tokens does not fit into memory; set chunk_tokens lower")


def encode_in_room(chunks: Sequence[Chunk], keeps: Sequence[bool], may_halve: bool) -> tuple[list[Encoded], int]:
    """Return the encoding of all chunks in as many parts as fit, and how many chunks or graphs did not.

    keeps: of which chunks the graph is wanted. Where one does not fit none is kept, not even those there: the loss needs room.
    """
    done: list[Encoded] = []
    num_refused = 0
    for chunk, with_graph in zip(chunks, keeps, strict=True):
        with_graph = with_graph and not num_refused
        found = _encode(chunk, with_graph, may_halve)
        if found is None and with_graph:
            log.warning("out of memory: the graph of a chunk of %d tokens is not kept, nor any other", chunk.num_padded_tokens)
            done = [Encoded(encoded.chunk, encoded.embedding_mD.detach(), False) for encoded in done]
            num_refused += 1
            free_what_failed()
            found = _encode(chunk, False, may_halve)
        parts = _encode_halves(chunk) if found is None else [found]
        num_refused += len(parts) - 1
        done += parts
    return done, num_refused


def _encode(chunk: Chunk, with_graph: bool, may_halve: bool) -> Encoded | None:
    """Return a chunk's encoding, or None where it does not fit and something can be done about it."""
    try:
        return Encoded(chunk, encode_chunk(chunk, with_graph=with_graph, is_kept=with_graph), with_graph)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if not may_halve or (len(chunk.rows) < 2 and not with_graph):
            raise out_of_memory(chunk) from error
    return None


def _encode_halves(chunk: Chunk) -> list[Encoded]:
    free_what_failed()
    log.warning("out of memory: a chunk of %d padded tokens is halved", chunk.num_padded_tokens)
    found = [(half, _encode(half, False, True)) for half in chunk.halves()]
    return [part for half, encoded in found for part in ([encoded] if encoded is not None else _encode_halves(half))]


def tight_surrogates(
    chunk: Chunk, surrogate: Callable[[Chunk], Tensor], may_halve: bool, halvings: int
) -> Iterator[tuple[Tensor, bool]]:
    """Yield what `surrogate` makes of a chunk, in less memory, and whether it is the last of the parts."""
    if not halvings:
        try:
            scalar = surrogate(chunk)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            yield scalar, True
            return
        free_what_failed()
    if not may_halve or len(chunk.rows) < 2 or draws(chunk):
        log.warning("out of memory: the graph of a chunk of %d padded tokens goes to the host", chunk.num_padded_tokens)
        with torch.autograd.graph.save_on_cpu():
            scalar = surrogate(chunk)
        yield scalar, True
        return
    if not halvings:
        log.warning("out of memory: a chunk of %d padded tokens is encoded again in halves", chunk.num_padded_tokens)
    first, second = chunk.halves()
    for half in (first, second):
        for scalar, is_last in tight_surrogates(half, surrogate, may_halve, max(0, halvings - 1)):
            yield scalar, is_last and half is second


def shrink_chunks(chunks: Sequence[Chunk], halvings: list[int], failed: int) -> bool:
    """Add a halving to the chunk whose backward failed, and to all of its tower that are not smaller, which would fail in turn.

    Returns whether the failed one can take less memory than it did.
    """
    sizes = [chunk.num_padded_tokens / 2**halved for chunk, halved in zip(chunks, halvings, strict=True)]
    if halvings[failed] and (draws(chunks[failed]) or 2 ** halvings[failed] >= len(chunks[failed].rows)):
        return False
    log.warning(
        "out of memory in a backward: chunks of %.0f padded tokens or more are encoded again in less memory", sizes[failed]
    )
    for i, (chunk, size) in enumerate(zip(chunks, sizes, strict=True)):
        halvings[i] += chunk.tower is chunks[failed].tower and size >= sizes[failed]
    return True


def free_what_failed() -> None:
    """Give back the memory of an attempt that failed, for the next one; once nothing refers to its error any more.

    Frames that hold an error which holds them, as those of context managers do, live until they are collected. Blocks that a
    GPU's allocator keeps are of the sizes of the attempt, and no use to one of half the size.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def draws(chunk: Chunk) -> bool:
    """Return whether the chunk's encoding takes random numbers; one row tells, where memory is short."""
    before = _generator_states(chunk.seed)
    encode_chunk(replace(chunk, rows=chunk.rows[-1:], places=chunk.places[-1:], lengths=chunk.lengths[-1:]), with_graph=False)
    return any(not torch.equal(a, b) for a, b in zip(before, _generator_states(None), strict=True))


def _generator_states(seed: int | None) -> list[Tensor]:
    if seed is not None:
        torch.manual_seed(seed)
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]
