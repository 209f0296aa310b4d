"""One training step at the memory of a chunk: encode without graph, loss on the embeddings, encode again with graph.

The gradient is that of the mean loss over the queries of all ranks, whatever the chunks, the kept graphs and the number of
ranks. Traded for it: a second forward of the chunks whose graph is not kept.
Source: Gao et al. 2021, arXiv 2101.06983.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from gradcache.batch import Batch
from gradcache.encode import backpropagate, encode_all, plan_encoding
from gradcache.loss import global_loss
from gradcache.objectives import Objective
from gradcache.replay import borrowed_generators
from gradcache.sync import GradientSync
from gradcache.temperature import Temperature


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step found, and what it cost. Without another word: on this rank."""

    loss: float  # mean over the queries of all ranks
    num_queries: int  # of all ranks
    num_chunks: int
    num_tokens: int  # encoded, without padding, a second encoding not counted
    num_padded_tokens: int  # the same with padding
    share_encoded_twice: float  # of the padded tokens
    share_masked: float  # of the scores of queries against passages
    encode_s: float
    loss_s: float  # gather and reduce-scatter included
    backward_s: float  # second encoding and parameter synchronisation included


def cached_step(
    batch: Batch,
    *,
    objective: Objective,
    temperature: Temperature,
    sync: GradientSync,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    keep_graphs: int | Literal["all"],
    seed: int,
    step: int,
    symmetric: bool = False,
    tile_rows: int | None = None,
) -> StepResult:
    """Add the gradient of the mean loss over the queries of all ranks to the parameters and the temperature.

    group: the ranks that share the loss; None for one process. sync: how the parameters' gradients become global ones.
    chunk_tokens: padded tokens encoded at once. keep_graphs: chunks that are encoded only once, with graph.
    seed, step: decide, with the rank, every draw of dropout; the generators are given back as they were.
    symmetric: the mean of both directions, queries -> passages and target passages -> queries.
    tile_rows: rows of scores evaluated at once; None: as many as fit a fixed memory.
    Collective: every rank of group calls it once a step, also with zero rows. The number of collectives does not depend on
    the number of chunks. Raises ValueError if no rank has a query.
    """
    device = temperature.log_scale.device
    started = _now_s(device)
    plan = plan_encoding(batch.towers, chunk_tokens, seed, step, rank=0 if group is None else group.rank())
    sync.hold()
    with borrowed_generators():
        embedding_nD, kept = encode_all(plan, keep_graphs)
        num_padded = sum(chunk.num_padded_tokens for chunk in plan.chunks)
        num_once = sum(plan.chunks[i].num_padded_tokens for i in kept)
        encoded = _now_s(device)
        loss = global_loss(
            batch,
            embedding_nD,
            objective=objective,
            temperature=temperature,
            group=group,
            symmetric=symmetric,
            tile_rows=tile_rows,
        )
        evaluated = _now_s(device)
        backpropagate(plan, kept, loss.gradient_nD, sync)
    return StepResult(
        loss=loss.value,
        num_queries=loss.num_queries,
        num_chunks=len(plan.chunks),
        num_tokens=sum(chunk.num_tokens for chunk in plan.chunks),
        num_padded_tokens=num_padded,
        share_encoded_twice=1 - num_once / num_padded if num_padded else 0.0,
        share_masked=loss.share_masked,
        encode_s=encoded - started,
        loss_s=evaluated - encoded,
        backward_s=_now_s(device) - evaluated,
    )


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # otherwise a phase would be charged with what an earlier one queued
    return time.perf_counter()
