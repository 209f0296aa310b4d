"""What a step sends between the ranks, message by message, from sizes alone: a formula, which tests hold against real calls.

Exact are those of the loss where every rank has as many rows. Of the parameters' messages the sum is met: DDP cuts its buckets at
whole parameters, and FSDP2 pads.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from gradcache.agree import NUM_AGREED
from gradcache.free import Device
from gradcache.loss_memory import LossSizes, way_of_sizes
from gradcache.objectives.tile import trained_parameters
from gradcache.options import LossOptions
from gradcache.tiles import num_statistics
from gradcache.way import targets_travel
from gradcache.widths import View, plan_views

Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
Travels = Literal["queries", "passages"]
TIMES = {"all_reduce": 2}  # there and back; others go once
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20  # of DistributedDataParallel, if nothing else is said
AGREED_NUMBERS, BROKEN_NUMBERS = 4, 1  # that a training loop reduces before a step, and behind it where gradients are whole


@dataclass(frozen=True)
class Message:
    """One collective of a step."""

    collective: Collective
    phase: str  # gather, statistics, reduce_scatter, control, or parameters
    num_bytes: int  # of a gather's output, a reduce-scatter's input, an all-reduce's tensor; in an all-to-all what a rank sends


@dataclass(frozen=True, kw_only=True)
class ShardTraffic:
    """How often a backend that shards weights moves them in a step."""

    chunks: int = 1  # of a rank, the same on each
    kept: int = 0  # of them, with their graph
    layers: int = 1  # gathered one by one
    outside_bytes: int = 0  # of the weights outside of layers, gathered together; float32
    frozen_bytes: int = 0  # gathered, too, and never reduced; float32
    layer_itemsize: int = 4  # bytes of a layer's weight while it is gathered, with fsdp2
    small_bytes: int = 0  # of the weights that zero3 keeps whole on every rank; float32
    reduces_every_chunk: bool = False
    reshards_after_forward: bool = True

    @property
    def backwards(self) -> int:
        """Backwards of a step that reduce gradients."""
        return self.chunks if self.reduces_every_chunk else 1


def step_traffic(
    options: LossOptions,
    sizes: LossSizes,
    trained_bytes: int,
    backend: str = "ddp",
    *,
    num_value_columns: int = 0,
    positives_per_query: float = 1.0,
    num_towers: int = 1,
    in_loop: bool = True,
    sharded: ShardTraffic | None = None,
    device: Device | None = None,
) -> list[Message]:
    """Return the messages of a step; none of one rank.

    trained_bytes: of the trained weights' gradients, float32. backend: ddp, fsdp2, zero0 to zero3.
    num_value_columns: values that travel with each query. positives_per_query: judged positives.
    in_loop: with the small messages of the trainer's loop around the step, of its agreements and its optimizer.
    sharded: for fsdp2, zero2 and zero3. device: on which the choice of what travels is made; None: a CPU.
    """
    if sizes.num_ranks == 1:
        return []
    how = sharded or ShardTraffic()
    messages = [Message("all_reduce", "control", 8 * AGREED_NUMBERS)] * in_loop
    if backend == "zero3" or backend == "fsdp2" or (backend == "zero2" and how.reduces_every_chunk):
        messages.append(Message("all_gather", "control", 8 * num_towers * sizes.num_ranks))
    messages.append(Message("all_gather", "control", 8 * NUM_AGREED * sizes.num_ranks))
    travels = travelling(options, sizes, device or torch.device("cpu"))
    messages += loss_messages(options, sizes, travels, num_value_columns, positives_per_query)
    return messages + parameter_messages(trained_bytes, backend, how) + _of_optimizer(backend) * in_loop


def sent_bytes(message: Message, num_ranks: int) -> float:
    """Return what one rank sends of a message, by the ring or pairwise, whichever a library takes."""
    return TIMES.get(message.collective, 1) * message.num_bytes * (num_ranks - 1) / num_ranks


def travelling(options: LossOptions, sizes: LossSizes, device: Device) -> Travels:
    """Return what travels, as a step chooses it."""
    return way_of_sizes(options, sizes, device).travels


def loss_messages(
    options: LossOptions, sizes: LossSizes, travels: Travels, num_value_columns: int = 0, positives_per_query: float = 1.0
) -> list[Message]:
    """Return the messages of the loss, in their order."""
    num_ranks, own, views = sizes.num_ranks, sizes.queries_here, _views(options, sizes)
    passages, dtype = sizes.passages_here, options.product_dtype or torch.float32
    keys = passages + 3 * own + math.ceil(own * positives_per_query) + own * (num_value_columns + len(views))
    both = options.symmetric or options.same_side
    if travels == "queries":
        rows = own * (2 if targets_travel(options) else 1)
        num_spread = 2 if options.symmetric and options.same_side else 1
    else:
        rows, num_spread = passages + own * both, 0
    found = [
        Message("all_gather", "control", 8 * num_ranks * keys),
        Message("all_gather", "gather", num_ranks * rows * sizes.width * dtype.itemsize),
    ]
    objective = options.objective
    statistics = 4 * num_ranks * own * num_statistics(objective) * len(views) * num_spread
    there = [Message("all_to_all", "statistics", statistics)] if num_spread else []
    found += there + _of_batch(options, own, num_ranks, len(views)) + there
    returned = len(views) * num_spread if objective.returns_positive else 0  # further components of the queries
    gradients = 4 * num_ranks * rows * (sizes.width + returned)
    num_learnt = sum(parameter.numel() for parameter in trained_parameters(objective))
    return [
        *found,
        Message("reduce_scatter", "reduce_scatter", gradients),
        Message("all_reduce", "control", 8 * (3 + num_learnt)),
    ]


def parameter_messages(trained_bytes: int, backend: str, how: ShardTraffic) -> list[Message]:
    """Return how the trained weights' gradients, and sharded weights, move."""
    if backend == "ddp" or backend == "zero0":
        buckets = [min(FIRST_BUCKET_BYTES, trained_bytes)] if backend == "ddp" and trained_bytes else []
        while (left := trained_bytes - sum(buckets)) > 0:
            buckets.append(min(BUCKET_BYTES, left) if backend == "ddp" else left)
        return [Message("all_reduce", "parameters", size) for size in buckets]
    if backend == "fsdp2":
        return _of_fsdp2(trained_bytes, how)
    return _of_zero(trained_bytes, int(backend.removeprefix("zero")), how)


def _of_fsdp2(trained_bytes: int, how: ShardTraffic) -> list[Message]:
    """Return the gathers of each layer in every forward and backward, and of the rest, which stays until a backward has ended."""
    again = how.chunks - how.kept  # chunks that are encoded twice
    layer_bytes = max(0, trained_bytes + how.frozen_bytes - how.outside_bytes) // how.layers
    of_layer, of_rest = 1, 1
    if how.reshards_after_forward:
        of_layer, of_rest = how.chunks + again + how.chunks, 1 + max(0, again - (how.kept == 0))
    gathers = [Message("all_gather", "parameters", how.outside_bytes)] * of_rest * (how.outside_bytes > 0)
    gathers += [Message("all_gather", "parameters", layer_bytes * how.layer_itemsize // 4)] * of_layer * how.layers
    trained_outside = min(how.outside_bytes, trained_bytes)
    of_layers = max(0, trained_bytes - trained_outside) // how.layers
    sums = [Message("reduce_scatter", "parameters", of_layers)] * how.layers
    sums += [Message("reduce_scatter", "parameters", trained_outside)] * (how.outside_bytes > 0)
    return gathers + sums * how.backwards


def _of_zero(trained_bytes: int, stage: int, how: ShardTraffic) -> list[Message]:
    """Return what DeepSpeed 0.19 is seen to do: its first stages sum whole gradients, and gather what each rank has updated.

    Its third stage gathers weights in every forward and backward; those that stay whole are gathered once, behind the update.
    """
    if stage < 3:
        sums = [Message("all_reduce", "parameters", trained_bytes)] * (how.backwards if stage == 2 else 1)
        return [*sums, Message("all_gather", "parameters", trained_bytes)]
    passes = 2 * how.chunks + how.chunks - how.kept
    gathered = max(0, trained_bytes + how.frozen_bytes - how.small_bytes) // how.layers
    gathers = [Message("all_gather", "parameters", gathered)] * passes * how.layers * (gathered > 0)
    gathers += [Message("all_gather", "parameters", how.small_bytes)] * (how.small_bytes > 0)
    return [*gathers, *[Message("reduce_scatter", "parameters", trained_bytes)] * how.backwards]


def _of_optimizer(backend: str) -> list[Message]:
    """Return the small sums before an update: of what is broken, and of norms."""
    if backend in ("ddp", "zero0"):
        return [Message("all_reduce", "control", 8 * BROKEN_NUMBERS)]
    if backend == "fsdp2":
        return []
    return [Message("all_reduce", "control", 8 if backend == "zero3" else 4)] * 2


def _of_batch(options: LossOptions, own_rows: int, num_ranks: int, num_views: int) -> list[Message]:
    """Return the messages of a loss whose rows depend on those of the whole batch."""
    objective = options.objective
    if not objective.has_batch_numbers:
        return []
    num_terms = num_views * (2 if options.symmetric and options.partition == "each" else 1)
    width = own_rows * objective.gathered_width or sum(merge.width for merge in objective.batch_merges)
    whole = 4 * num_ranks * width * num_terms
    return [Message("all_gather", "control", whole), Message("all_reduce", "control", whole)]


def _views(options: LossOptions, sizes: LossSizes) -> list[View]:
    return plan_views(options.widths, options.width_weights, {"embedding": sizes.width}, options.outputs)
