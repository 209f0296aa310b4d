"""What a rank of a plan holds: the trainer's own estimate (trainer/step_memory.py) and choice of chunks, for any device."""

from dataclasses import dataclass, replace

from gradcache.budget import BACKWARD_SHARE, KEPT_SHARE, MOST_CHUNK_TOKENS, choose_tokens
from launch.plan.devices import GIB, PlannedDevice
from launch.plan.planned_model import PlannedModel
from launch.plan.planned_texts import PlannedTexts
from launch.plan.step_work import Chunks, StepWork, chunks_of
from launch.plan.storage import own_part_bytes
from trainer.budget import CPU_BUDGET, FREE_SHARE
from trainer.encoder.encode import DTYPES
from trainer.errors import InputError
from trainer.job import TrainJob
from trainer.loading import refuse_too_large
from trainer.step_memory import StepMemory, model_memory, step_memory
from trainer.tasks import loss_options


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """What a rank holds, how it encodes, and why that cannot be, if it cannot."""

    items: StepMemory
    gathered_bytes: int  # layers of a sharded model that are whole for a moment, which the trainer's estimate leaves out
    saved_bytes: int  # the copy of what the rank writes of a checkpoint, where that is in the same memory
    limit_bytes: float
    chunks: Chunks
    problems: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether a step goes."""
        return not self.problems

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.items.total + self.gathered_bytes + self.saved_bytes


def rank_memory(
    job: TrainJob,
    model: PlannedModel,
    texts: PlannedTexts,
    device: PlannedDevice,
    work: StepWork,
    num_shards: int,
) -> RankMemory:
    """Return what the largest rank holds. num_shards: ranks that hold a copy of a sharded model between them."""
    # The trainer's estimate shards among as many ranks as it is told; of one rank it takes no backend.
    lasting = model_memory(model.encoder, job, num_shards if num_shards > 1 else work.num_ranks, device.type, is_first=True)
    whole = (device.memory_gib - device.process_gib) * GIB
    limit = job.chunk.memory_gib * GIB if job.chunk.memory_gib is not None else FREE_SHARE * whole
    held = step_memory(lasting, loss_options(job.loss, job.precision), work.sizes, device.memory, limit)
    is_sharded = job.parallel.backend in ("fsdp2", "zero3") and work.num_ranks > 1
    gathered = _gathered_bytes(job, model) if is_sharded else 0
    if is_sharded:  # what autocast would copy is gathered, and freed behind each layer
        kept_graph, at_work = (replace(cost, fixed=0.0) for cost in (model.graph, model.graph_at_work))
        model = replace(model, graph=kept_graph, graph_at_work=at_work)
    saved = own_part_bytes(job, model, work.num_ranks, num_shards) if device.type == "cpu" else 0
    room = limit - held.total - gathered - saved
    limit_tokens, problem = _chunk_tokens(job, model, texts, device, room)
    chunks = chunks_of(work, limit_tokens, is_packed=device.type == "cuda")
    chunks = replace(chunks, num_kept=_num_kept(job, device, model, chunks, room))
    items = _with_graphs(held, model, chunks)
    problems = [problem] if problem else []
    total = items.total + gathered + saved
    if not problem and total > limit:
        problems.append(f"a rank takes {total / GIB:.1f} GiB of the {limit / GIB:.1f} that it may use; set {_lower(items, job)}")
    if is_sharded:
        problems += _too_large(job, model, whole, num_shards)
    return RankMemory(
        items=items,
        gathered_bytes=gathered,
        saved_bytes=saved,
        limit_bytes=limit,
        chunks=chunks,
        problems=tuple(problems),
    )


def _with_graphs(held: StepMemory, model: PlannedModel, chunks: Chunks) -> StepMemory:
    """Return the items with graphs. Kept ones go backward first, so the graph of another chunk comes only when they are gone."""
    first_kept = chunks.num - chunks.num_kept
    costs = list(zip(chunks.padded, chunks.longest, strict=True))
    again = max((model.graph_at_work.of(*cost) for cost in costs[:first_kept]), default=0.0)
    kept = [model.graph.of(*cost) for cost in costs[first_kept:]]
    kept_bytes = sum(kept)
    growth = (BACKWARD_SHARE - 1) * max(kept, default=0.0)  # of the first backward, beside all that are kept
    chunk = max(growth, BACKWARD_SHARE * again - kept_bytes)
    return replace(held, chunk=int(chunk), kept_graphs=int(kept_bytes))


def _gathered_bytes(job: TrainJob, model: PlannedModel) -> int:
    """Return what is whole at once: the layer at work, the next one, and what stands outside of the layers."""
    return 2 * model.layer_parameters * DTYPES[job.precision.encode].itemsize + 4 * model.other_parameters


def _chunk_tokens(job: TrainJob, model: PlannedModel, texts: PlannedTexts, device: PlannedDevice, room: float) -> tuple[int, str]:
    """Return the tokens of a chunk as the trainer would choose them, and why none fits."""
    if job.chunk.tokens != "auto":
        return job.chunk.tokens, ""
    if device.type == "cpu" and job.chunk.memory_gib is None:
        return CPU_BUDGET.chunk_tokens, ""
    try:
        return choose_tokens(room, model.graph, texts.longest, MOST_CHUNK_TOKENS[device.type]), ""
    except ValueError as error:
        if room < 0:
            return texts.longest, f"without any graph a rank takes {-room / GIB:.1f} GiB more than it may use; {_shard(job)}"
        return texts.longest, str(error)


def _num_kept(job: TrainJob, device: PlannedDevice, model: PlannedModel, chunks: Chunks, room: float) -> int:
    asked = job.chunk.keep_graphs
    if asked != "auto":
        return chunks.num if asked == "all" else min(asked, chunks.num)
    if device.type == "cpu" and job.chunk.memory_gib is None:
        return int(CPU_BUDGET.keep_graphs)
    costs = [model.graph.of(*cost) for cost in zip(chunks.padded, chunks.longest, strict=True)]
    left, kept = KEPT_SHARE * (room - (BACKWARD_SHARE - 1) * max(costs)), 0
    for cost in reversed(costs):  # as kept_within of gradcache/budget.py
        left -= cost
        if left < 0:
            break
        kept += 1
    return kept


def _lower(items: StepMemory, job: TrainJob) -> str:
    """Return which setting makes the largest item smaller."""
    largest = max(vars(items), key=lambda name: vars(items)[name])
    return {
        "chunk": "chunk.tokens lower",
        "kept_graphs": "chunk.keep_graphs lower",
        "kept_scores": "loss.keep_scores_gib lower",
        "tile": "loss.tile_rows lower",
        "embeddings": 'loss.gather="queries", batch.queries or negatives.per_query lower',
        "average": "ema.decay out",
    }.get(largest, _shard(job))


def _shard(job: TrainJob) -> str:
    if job.parallel.backend in ("ddp", "zero0"):
        return "parallel.backend=fsdp2, which shards the model, or model.lora_rank, which trains adapters"
    return "a smaller model, or take more ranks"


def _too_large(job: TrainJob, model: PlannedModel, memory_bytes: float, num_shards: int) -> list[str]:
    """Return why the model cannot be evaluated: the trainer's own refusal."""
    try:
        refuse_too_large(job.model.name, model.num_parameters, int(memory_bytes), num_shards)
    except InputError as error:
        return [str(error)]
    return []
