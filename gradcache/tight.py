"""What is done when a chunk does not fit into memory: half as many rows at once, or its graph in the host's memory.

Before the loss any chunk may be halved. After the loss a chunk has to draw the same dropout as before, so only a chunk without
random draws may be halved; the graph of any other chunk is kept in the host's memory until its backward.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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


def encode_or_halve(chunk: Chunk, *, with_graph: bool, may_halve: bool) -> list[Encoded]:
    """Return the encoding of a chunk in as many parts as fit, without the graph if that is what does not fit."""
    try:
        return [Encoded(chunk, encode_chunk(chunk, with_graph=with_graph, is_kept=with_graph), with_graph)]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if not may_halve or (len(chunk.rows) < 2 and not with_graph):
            raise out_of_memory(chunk) from error
    # This stands outside of the handler, because the traceback would keep the tensors that did not fit.
    if with_graph:
        log.warning("out of memory: the graph of a chunk of %d tokens is not kept", chunk.num_padded_tokens)
        return encode_or_halve(chunk, with_graph=False, may_halve=may_halve)
    log.warning("out of memory: a chunk of %d padded tokens is halved", chunk.num_padded_tokens)
    return [part for half in chunk.halves() for part in encode_or_halve(half, with_graph=False, may_halve=may_halve)]


def tight_surrogates(
    chunk: Chunk, surrogate: Callable[[Chunk], Tensor], may_halve: bool, halvings: int
) -> Iterator[tuple[Tensor, bool]]:
    """Yield what `surrogate` makes of a chunk, in less memory, and whether it is the last of the parts."""
    if halvings and (not may_halve or len(chunk.rows) < 2 or draws(chunk)):
        log.warning("out of memory: the graph of a chunk of %d padded tokens goes to the host", chunk.num_padded_tokens)
        with torch.autograd.graph.save_on_cpu():
            scalar = surrogate(chunk)
        yield scalar, True
        return
    if halvings:
        log.warning("out of memory: a chunk of %d padded tokens is encoded again in halves", chunk.num_padded_tokens)
        first, second = chunk.halves()
        for half in (first, second):
            for scalar, is_last in tight_surrogates(half, surrogate, may_halve, halvings - 1):
                yield scalar, is_last and half is second
        return
    try:
        scalar = surrogate(chunk)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        yield scalar, True
        return
    yield from tight_surrogates(chunk, surrogate, may_halve, 1)


def draws(chunk: Chunk) -> bool:
    """Return whether the chunk's encoding takes random numbers."""
    before = _generator_states(chunk.seed)
    encode_chunk(chunk, with_graph=False)
    return any(not torch.equal(a, b) for a, b in zip(before, _generator_states(None), strict=True))


def _generator_states(seed: int | None) -> list[Tensor]:
    if seed is not None:
        torch.manual_seed(seed)
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]
