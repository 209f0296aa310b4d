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
from torch.profiler import record_function

from gradcache.agree import agree
from gradcache.batch import Batch
from gradcache.encode import backpropagate, encode_all
from gradcache.exchange import gather_integers
from gradcache.loss import global_loss
from gradcache.lost import naming_lost_ranks
from gradcache.options import LossOptions
from gradcache.plan import Plan, chunks_of_each_tower, plan_encoding
from gradcache.replay import borrowed_generators
from gradcache.sync import GradientSync
from gradcache.temperature import Temperature
from gradcache.way import Way


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step found, and what it cost; figures are of this rank unless they say otherwise."""

    loss: float  # mean over the queries of all ranks
    num_queries: int  # of all ranks
    num_chunks: int
    num_halved: int  # chunks and graphs that did not fit into memory, and backwards of the last step; the most on any rank
    num_tokens: int  # encoded, without padding, a second encoding not counted
    num_padded_tokens: int  # the same with padding
    share_encoded_twice: float  # of the padded tokens
    share_masked: float  # of the scores of queries against passages, of all ranks
    way: Way  # what travelled to the other ranks, and why
    spread: float | None  # 1 - the mean cosine among queries or passages of a rank, the most of all; None: no rank has two
    encode_s: float
    loss_s: float  # gather and reduce-scatter included
    backward_s: float  # second encoding and parameter synchronisation included


def cached_step(
    batch: Batch,
    *,
    loss: LossOptions,
    temperature: Temperature,
    sync: GradientSync,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    keep_graphs: int | Literal["all"],
    seed: int,
    step: int,
    progress: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
    weight: float = 1.0,
    is_last: bool = True,
) -> StepResult:
    """Add the gradient of the mean loss over the queries of all ranks to the parameters and the temperature.

    group: the ranks that share the loss; None for one process. sync: how the parameters' gradients become global ones.
    chunk_tokens: padded tokens encoded at once. keep_graphs: chunks that are encoded only once, with graph.
    seed, step: decide, with the rank, every draw of dropout; the generators are given back as they were.
    progress: of the training, 0 to 1, for objectives that follow it.
    scaler: of float16 training; gradients come out times its scale, the temperature's too, as behind `scaler.scale(loss)`.
    weight: factor of the gradients, not of the reported loss.
    is_last: False where other parts of the same update follow, such as the batches of other tasks: their gradients add up
    on each rank, and the part that is last synchronises them, once. Give parts different seeds, or they draw equal dropout.
    Mixed precision is the encoder's: let it run under autocast, or this whole call; the loss is computed outside of it.
    Collective: every rank of group calls it once a step or part, also with zero rows. The number of collectives does not
    depend on the number of chunks. Raises, on every rank alike and before any gradient: ValueError if no rank has a query or the
    towers' widths differ, NotFinite for a broken embedding; LostRank where a rank is gone. If one rank alone raises an error,
    the others raise LostRank with that error as the reason.
    """
    device = temperature.log_scale.device
    rank = 0 if group is None else group.rank()
    started = _now_s(device)
    plan = plan_encoding(batch.towers, chunk_tokens, seed, step, rank)
    if sync.communicates_in_forward and group is not None:
        plan = _equalized(plan, batch, chunk_tokens, seed, step, group, device)
    sync.hold()
    with borrowed_generators():
        with naming_lost_ranks(group), record_function("encode"):  # sharded parameters are gathered within
            encoding = encode_all(plan, keep_graphs, sync)
        chunks, share_encoded_twice = encoding.plan.chunks, encoding.share_encoded_twice
        encoded = _now_s(device)
        num_refused, sync.num_forgotten = encoding.num_refused + sync.num_forgotten, 0
        agreed = agree(batch, encoding, loss.objective, num_refused, group, device)
        scale = weight * _scale_of(scaler, device)
        with torch.autocast(device.type, enabled=False), naming_lost_ranks(group), record_function("loss"):
            found = global_loss(
                batch, agreed, options=loss, temperature=temperature, group=group, gradient_scale=scale, progress=progress
            )
        evaluated = _now_s(device)
        with naming_lost_ranks(group), record_function("backward"):
            backpropagate(encoding, found.gradient_nD, sync, scale, is_last)
    return StepResult(
        loss=found.value,
        num_queries=found.num_queries,
        num_chunks=len(chunks),
        num_halved=agreed.num_halved,
        num_tokens=sum(chunk.num_tokens for chunk in chunks),
        num_padded_tokens=encoding.num_padded_tokens,
        share_encoded_twice=share_encoded_twice,
        share_masked=found.share_masked,
        way=found.way,
        spread=agreed.spread,
        encode_s=encoded - started,
        loss_s=evaluated - encoded,
        backward_s=_now_s(device) - evaluated,
    )


def _equalized(
    plan: Plan, batch: Batch, chunk_tokens: int, seed: int, step: int, group: dist.ProcessGroup, device: torch.device
) -> Plan:
    """Return this rank's plan with as many chunks of each tower as the rank that has most. Collective: one all-gather."""
    every = gather_integers(chunks_of_each_tower(plan, batch.towers), group, device)
    most = [max(counts) for counts in zip(*every, strict=True)]
    return plan_encoding(batch.towers, chunk_tokens, seed, step, group.rank(), most)


def _scale_of(scaler: torch.amp.GradScaler | None, device: torch.device) -> float:
    """Return the factor by which float16's gradients are kept from underflow."""
    return 1.0 if scaler is None or not scaler.is_enabled() else scaler.scale(torch.ones((), device=device)).item()


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # otherwise the time of work that an earlier phase queued would count for this one
    return time.perf_counter()
