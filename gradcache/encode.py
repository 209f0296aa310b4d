"""Both encodings of a step's rows: without graph at first, with graph chunk by chunk behind the loss (phases 1, 2 and 6).

The last chunks may keep their graph in the first encoding; they need no second one. Memory: one chunk's graph, and those
that are kept. A chunk that does not fit goes through `gradcache/tight.py`.
"""

import logging
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gradcache.plan import Chunk, Plan, encode_chunk
from gradcache.sync import GradientSync
from gradcache.tight import (
    encode_in_room,
    free_what_failed,
    is_out_of_memory,
    out_of_memory,
    shrink_chunks,
    tight_surrogates,
)
from gradcache.transfers import upload

log = logging.getLogger(__name__)

# n rows of the batch, u distinct rows, which are encoded, m rows of a chunk


@dataclass
class Encoding:
    """A step's rows after the first encoding."""

    plan: Plan  # as it was carried out
    embedding_nD: Tensor | None  # detached; None without rows, and where widths differ
    kept: dict[int, Tensor]  # embeddings with their graph, by chunk
    widths: set[int]  # more than one where towers do not fit together
    num_refused: int = 0  # chunks and graphs that did not fit into memory

    @property
    def num_padded_tokens(self) -> int:
        """Padded tokens of all chunks."""
        return sum(chunk.num_padded_tokens for chunk in self.plan.chunks)

    @property
    def share_encoded_twice(self) -> float:
        """Share of the padded tokens whose graph is not kept; until `backpropagate` has used the graphs."""
        num_once = sum(self.plan.chunks[i].num_padded_tokens for i in self.kept)
        return 1 - num_once / self.num_padded_tokens if self.num_padded_tokens else 0.0


def num_kept_graphs(keep_graphs: int | Literal["all"], num_chunks: int) -> int:
    """Return how many of the chunks keep their graph."""
    kept = num_chunks if keep_graphs == "all" else min(keep_graphs, num_chunks)
    if kept < 0:
        raise ValueError(f'keep_graphs={keep_graphs} must be at least 0, or "all"')
    return kept


def encode_all(plan: Plan, keep_graphs: int | Literal["all"], sync: GradientSync) -> Encoding:
    """Return the embeddings of the batch's rows, with the graphs of the last `keep_graphs` chunks."""
    first_kept = len(plan.chunks) - num_kept_graphs(keep_graphs, len(plan.chunks))
    keeps = [i >= first_kept and not chunk.tower.is_frozen for i, chunk in enumerate(plan.chunks)]
    done, num_refused = encode_in_room(plan.chunks, keeps, not sync.communicates_in_forward)
    plan = replace(plan, chunks=[encoded.chunk for encoded in done])
    kept = {i: encoded.embedding_mD for i, encoded in enumerate(done) if encoded.with_graph}
    filled = [encoded.embedding_mD.detach() for encoded in done if len(encoded.chunk.rows)]
    widths = {embedding.shape[1] for embedding in filled}
    if len(widths) != 1:
        return Encoding(plan, None, kept, widths, num_refused)
    embedding_uD = torch.cat(filled)
    return Encoding(plan, embedding_uD[upload(plan.place_n, embedding_uD.device)], kept, widths, num_refused)


def backpropagate(
    encoding: Encoding, gradient_nD: Tensor, sync: GradientSync, scale: float | Tensor, is_last: bool = True
) -> None:
    """Carry `scale` times the gradient of the embeddings into the parameters. Empties `encoding.kept`.

    is_last: no further part of the step follows.
    Collective if it is: one synchronisation of the parameters, in the last backward, also without rows.
    """
    plan = encoding.plan
    gradient_uD = gradient_nD.new_zeros(plan.num_distinct, gradient_nD.shape[1])
    gradient_uD.index_add_(0, upload(plan.place_n, gradient_nD.device), gradient_nD).mul_(scale * sync.gradient_scale())
    halvings, has_failed = [0] * len(plan.chunks), False
    while (failed := _backward_all(plan, encoding.kept, gradient_uD, sync, halvings, is_last, has_failed)) is not None:
        # A backward that ran out of memory has left part of its gradient behind: all are taken back and made again.
        has_failed = True
        sync.forget_gradients()
        if encoding.kept:
            log.warning("out of memory: %d kept graphs are given up", len(encoding.kept))
            encoding.kept.clear()
        elif not shrink_chunks(plan.chunks, halvings, failed):
            raise out_of_memory(plan.chunks[failed])
        free_what_failed()


def _backward_all(
    plan: Plan,
    kept: dict[int, Tensor],
    gradient_uD: Tensor,
    sync: GradientSync,
    halvings: list[int],
    is_last_of_step: bool,
    has_failed: bool,
) -> int | None:
    """Run all backwards, those of chunks with halvings in less memory; return the chunk whose backward ran out of memory.

    Kept graphs come first, so that their memory is free before the next chunk is encoded again.
    has_failed: one ran out of memory before; then none of them synchronises, so that each can be repeated, but an empty one does.
    """
    trained = [i for i, chunk in enumerate(plan.chunks) if not chunk.tower.is_frozen]
    order = [*kept, *(i for i in trained if i not in kept)]
    synchronising = order[-1] if order and is_last_of_step and not has_failed else None
    for i in order:
        try:
            for surrogate, is_last_part in _surrogates(plan.chunks[i], kept.pop(i, None), gradient_uD, sync, halvings[i]):
                (sync.last_backward if i == synchronising and is_last_part else sync.backward)(surrogate)
                del surrogate
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if not sync.can_forget_gradients():
                raise out_of_memory(plan.chunks[i]) from error
            return i
    if is_last_of_step and synchronising is None:
        sync.last_backward(gradient_uD.sum())  # nothing to add, but the others wait for this rank
    return None


def _surrogates(chunk: Chunk, embedding_mD: Tensor | None, gradient_uD: Tensor, sync: GradientSync, halvings: int):
    """Yield scalars whose backwards put the chunk's gradient into the parameters, and whether it is the last of them."""

    def surrogate(part: Chunk, embedding_mD: Tensor | None = None) -> Tensor:
        if embedding_mD is None:
            embedding_mD = encode_chunk(part, with_graph=True)
        if not len(part.rows):
            return embedding_mD.sum() * 0  # its backward communicates, where backwards do
        gradient_mD = gradient_uD[part.places.start : part.places.stop].to(embedding_mD.dtype)
        return (embedding_mD * gradient_mD).sum()

    if not halvings and embedding_mD is not None:
        yield surrogate(chunk, embedding_mD), True
        return
    yield from tight_surrogates(chunk, surrogate, not sync.communicates_in_forward, halvings)
