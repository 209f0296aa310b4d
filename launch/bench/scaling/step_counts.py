"""What a step sends and computes: counted call by call in a step behind the measured ones, and by the formulas."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from gradcache import StepResult
from gradcache.encode import num_kept_graphs
from gradcache.loss_memory import LossSizes
from gradcache.traffic import Message, ShardTraffic, sent_bytes, step_traffic
from launch.bench.flops import token_flops
from launch.bench.moved import Moved
from trainer.encoder.towers import Encoder
from trainer.precision import DTYPES
from trainer.prepare import Training


@dataclass(frozen=True)
class StepCounts:
    """One step of this rank."""

    result: StepResult
    sent_bytes: float
    formula_bytes: float


def count_step(run: Training, one_step: Callable[[Training], StepResult]) -> StepCounts:
    """Take a step more, and count what it sends; it is slower for that. Collective."""
    world = run.world
    with Moved(world.num_ranks) as moved:
        result = one_step(run)
    formula = sum(sent_bytes(message, world.num_ranks) for message in foreseen_messages(run, result))
    return StepCounts(result, float(moved.num_bytes), formula)


def foreseen_messages(run: Training, result: StepResult) -> list[Message]:
    """Return the messages of such a step by the formula; of several tasks in a step as if they were one."""
    state, world = run.state, run.world
    assert state.budget is not None, "a step was taken"
    encoder = state.parallel.encoder
    assert isinstance(encoder, Encoder)
    kept = num_kept_graphs(state.budget.keep_graphs, result.num_chunks)
    trained = sum(4 * numel(p) for p in encoder.parameters() if p.requires_grad)
    every = sum(4 * numel(p) for p in encoder.parameters())
    layers = encoder.layers()
    in_layers = sum(4 * numel(p) for layer in layers for p in layer.parameters())
    parallel = run.job.parallel
    sharded = ShardTraffic(
        chunks=result.num_chunks,
        kept=kept,
        layers=max(1, len(layers)),
        outside_bytes=every - in_layers,
        frozen_bytes=every - trained,
        layer_itemsize=DTYPES[run.job.precision.encode].itemsize,
        reduces_every_chunk=parallel.reduce == "chunk",
        reshards_after_forward=parallel.reshard_after_forward,
        small_bytes=sum(4 * numel(p) for p in encoder.parameters() if getattr(p, "ds_persist", False)),
    )
    return step_traffic(
        next(iter(run.tasks.values())).loss,
        sizes_of(run, result),
        trained,
        parallel.backend,
        positives_per_query=len(run.dataset.positive_rows) / run.dataset.num_queries,
        num_towers=2 if encoder.has_two_towers else 1,
        sharded=sharded,
        device=world.device,
    )


def sizes_of(run: Training, result: StepResult) -> LossSizes:
    """Return the sizes of a step's loss."""
    width = getattr(run.state.parallel.encoder, "width", 0)
    return LossSizes(queries=result.num_queries, passages=result.num_passages, width=width, num_ranks=run.world.num_ranks)


def work_of_step(run: Training, result: StepResult) -> float:
    """Return the operations of this rank's encoder in a step, what is encoded twice included."""
    flops, tokens = token_flops(run.state.parallel.encoder), (result.num_tokens, result.num_squared_tokens)
    return flops.forward(*tokens) * (1 + result.share_encoded_twice) + flops.backward(*tokens)


def numel(parameter: nn.Parameter) -> int:
    """Return the numbers of a parameter, whole, however it is sharded."""
    return getattr(parameter, "ds_numel", parameter.numel())
