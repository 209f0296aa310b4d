"""What one step of a plan does on its largest rank: texts, tokens, chunks, operations and messages, phase by phase."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from gradcache import LossOptions
from gradcache.chunks import plan_chunks
from gradcache.loss_memory import LossSizes, way_of_sizes
from gradcache.traffic import Message, ShardTraffic, step_traffic
from gradcache.way import Way
from gradcache.widths import plan_views
from launch.plan.devices import PlannedDevice
from launch.plan.planned_model import PlannedModel
from launch.plan.planned_texts import PlannedTexts
from trainer.encoder.encode import DTYPES
from trainer.job import TrainJob
from trainer.tasks import loss_options

UPDATE_BYTES = (
    36  # of a trained parameter: AdamW reads four numbers and writes three, and clipping reads a gradient and writes it
)
WEIGHT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """One step of the largest rank."""

    num_ranks: int
    queries: int  # of all ranks
    passages: int
    sizes: LossSizes
    lengths: np.ndarray  # of the texts of a rank, in tokens
    tokens: float  # of a rank
    tokens_of_all: float
    mean_length: float  # weighted by tokens, as attention sees it
    way: Way

    @property
    def queries_here(self) -> int:
        """Queries of the largest rank; others may have one less."""
        return self.sizes.queries_here


def step_work(
    job: TrainJob, model: PlannedModel, texts: PlannedTexts, device: PlannedDevice, num_ranks: int, queries: int, per_query: int
) -> StepWork:
    """Return what a step brings. queries: of all ranks. per_query: hard negatives of a query."""
    passages = queries * (1 + per_query)
    sizes = LossSizes(
        queries=queries, passages=passages, width=model.width, num_ranks=num_ranks, is_even=queries % num_ranks == 0
    )
    here = sizes.queries_here
    lengths = texts.lengths(here, here * (1 + per_query))
    tokens = float(lengths.sum())
    return StepWork(
        num_ranks=num_ranks,
        queries=queries,
        passages=passages,
        sizes=sizes,
        lengths=lengths,
        tokens=tokens,
        tokens_of_all=queries * texts.query_tokens + passages * texts.passage_tokens,
        mean_length=float((lengths.astype(np.float64) ** 2).sum()) / tokens,
        way=way_of_sizes(loss_options(job.loss, job.precision), sizes, device.memory),
    )


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """How a rank encodes its texts: the trainer's own plan of its lengths."""

    limit: int  # tokens of a chunk, at most
    padded: tuple[int, ...]  # tokens of each chunk, padding included, in the order in which they are encoded
    longest: tuple[int, ...]  # text of each
    num_kept: int  # last chunks that keep their graphs

    @property
    def num(self) -> int:
        """How many."""
        return len(self.padded)

    @property
    def tokens(self) -> int:
        """Tokens of all, padding included."""
        return sum(self.padded)

    @property
    def share_twice(self) -> float:
        """Share of the tokens that is encoded twice."""
        return 1 - sum(self.padded[self.num - self.num_kept :]) / self.tokens


def chunks_of(work: StepWork, limit: int, is_packed: bool) -> Chunks:
    """Return the chunks of at most so many tokens, none of which keeps its graph yet."""
    lengths = torch.from_numpy(np.ceil(work.lengths).astype(np.int64))
    plan = [lengths[rows] for rows in plan_chunks(lengths, limit, is_packed)]
    padded = tuple(int(chunk.sum()) if is_packed else len(chunk) * int(chunk.max()) for chunk in plan)
    return Chunks(limit=limit, padded=padded, longest=tuple(int(chunk.max()) for chunk in plan), num_kept=0)


def mean_chunk_tokens(texts: PlannedTexts, queries_here: int, per_query: int, limit: int) -> int:
    """Return the padded tokens of a rank's chunk, in the mean: what is to be measured, where padded chunks are encoded."""
    lengths = torch.from_numpy(np.ceil(texts.lengths(queries_here, queries_here * (1 + per_query))).astype(np.int64))
    plan = [lengths[rows] for rows in plan_chunks(lengths, limit)]
    return math.ceil(sum(len(chunk) * int(chunk.max()) for chunk in plan) / len(plan))


def phase_flops(work: StepWork, model: PlannedModel, options: LossOptions, chunks: Chunks, share_kept: float) -> dict[str, float]:
    """Return the operations of each phase on the largest rank; share_kept: of the scores, where two phases look at them."""
    forward = model.forward_flops(chunks.tokens, work.mean_length)
    products = score_flops(work, options)
    if work.way.travels == "queries":
        statistics, loss = products, products * (3 - share_kept)
    else:  # one sweep makes the scores and their gradient
        statistics, loss = 0.0, 3 * products
    return {
        "encode": forward,
        "statistics": statistics,
        "loss": loss,
        "encode_again": chunks.share_twice * forward + model.backward_flops(chunks.tokens, work.mean_length),
    }


def score_flops(work: StepWork, options: LossOptions) -> float:
    """Return the operations of one product that makes all of a rank's scores."""
    queries, passages, ranks = work.queries, work.passages, work.num_ranks
    pairs = queries * passages / ranks
    if options.symmetric:
        pairs += queries * queries / ranks
    if options.same_side:
        pairs += queries * queries / ranks * (2 if options.symmetric else 1)
    views = plan_views(options.widths, options.width_weights, {"embedding": work.sizes.width}, options.outputs)
    return 2.0 * pairs * sum(view.stop - view.first for view in views)


def messages_of(work: StepWork, job: TrainJob, model: PlannedModel, device: PlannedDevice, chunks: Chunks) -> list[Message]:
    """Return all that the ranks send each other in a step, sharded parameters included."""
    if work.num_ranks == 1:
        return []
    every, outside = (WEIGHT_BYTES * count for count in (model.num_parameters, model.other_parameters))
    trained = WEIGHT_BYTES * model.num_trained
    sharded = ShardTraffic(
        chunks=chunks.num,
        kept=chunks.num_kept,
        layers=model.num_layers_of_all,
        outside_bytes=outside,
        frozen_bytes=every - trained,
        layer_itemsize=DTYPES[job.precision.encode].itemsize,
        reduces_every_chunk=job.parallel.reduce == "chunk",
        reshards_after_forward=job.parallel.reshard_after_forward,
    )
    return step_traffic(
        loss_options(job.loss, job.precision),
        work.sizes,
        trained,
        job.parallel.backend,
        num_towers=2 if job.model.towers == "two" else 1,
        sharded=sharded,
        device=device.memory,
    )


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """What a step asks of a rank's device and network."""

    flops: dict[str, float]  # operations by phase
    messages: list[Message]
    update_bytes: float  # read and written by the optimizer


def update_bytes(model: PlannedModel, num_shards: int) -> float:
    """Return what an update reads and writes on a rank."""
    return UPDATE_BYTES * math.ceil(model.num_trained / num_shards)


@dataclass(frozen=True)
class Placement:
    """How ranks stand on nodes, and share what a backend shards."""

    num_ranks: int
    ranks_per_node: int
    num_shards: int  # ranks that hold one copy of the moments between them

    @property
    def num_nodes(self) -> int:
        """The last one may have fewer ranks."""
        return math.ceil(self.num_ranks / self.ranks_per_node)


def place_ranks(job: TrainJob, num_ranks: int, most_per_node: int) -> Placement:
    """Return the placement that a job's backend gives to so many ranks."""
    ranks_per_node, num_shards = min(num_ranks, most_per_node), 1
    if job.parallel.backend in ("fsdp2", "zero1", "zero2", "zero3"):
        by_node = job.parallel.backend == "fsdp2" and job.parallel.shard_group == "node"
        num_shards = ranks_per_node if by_node else num_ranks
    return Placement(num_ranks, ranks_per_node, num_shards)
