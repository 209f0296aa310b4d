"""What a rank holds in a step, item by item: one estimate for the budget, the printed plan and what is foreseen.

What stays from step to step is counted from the model; what the loss holds comes from `gradcache/loss_memory.py`; graphs are
measured by a probe (`trainer/budget.py`). Tests compare the items with what real steps allocate.
"""

from dataclasses import asdict, dataclass, replace

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gradcache import LossOptions
from gradcache.free import Device
from gradcache.loss_memory import LossSizes, loss_bytes
from trainer.job import TrainJob
from trainer.world import World

GIB = 2**30
TITLES = {"embeddings": "embeddings and their gradients", "kept_scores": "scores kept", "tile": "a tile of scores"}
TITLES |= {"published": "the published copy", "chunk": "a chunk's graph", "kept_graphs": "kept graphs", "average": "the average"}
TITLES |= {"backend": "the backend's copies", "gradients": "gradients", "optimizer": "the optimizer"}


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of a rank by what takes them."""

    weights: int
    gradients: int  # of the weights
    optimizer: int  # AdamW's moments; it is fused, and clips in place, so that an update takes nothing more
    average: int  # of the weights, where the job asks for one
    backend: int  # what DistributedDataParallel, FSDP2 or DeepSpeed hold beside: buckets, whole gradients, layers, copies
    published: int  # the copy that is published, on the one rank of a CPU that holds it in the same memory
    embeddings: int = 0  # of all that the loss sees, with their gradients
    kept_scores: int = 0
    tile: int = 0
    chunk: int = 0  # the graph of one, and what its backward takes
    kept_graphs: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    @property
    def lasting(self) -> int:
        """What stays between steps."""
        return self.weights + self.optimizer + self.average + self.backend + self.published

    def in_gib(self) -> dict[str, float]:
        """Return the items in plain words."""
        return {TITLES.get(name, name): round(size / GIB, 3) for name, size in asdict(self).items()}

    def __str__(self) -> str:
        return ", ".join(f"{name} {size:.2f}" for name, size in self.in_gib().items() if size >= 0.01)


def model_memory(encoder: nn.Module, job: TrainJob, num_ranks: int, device_type: str, is_first: bool) -> StepMemory:
    """Return what a rank holds of a model, whether or not it is already shared out. is_first: whether the rank publishes."""
    weights = local_trained = whole_trained = whole = 0
    for parameter in encoder.parameters():
        local = _held(parameter)
        weights, whole = weights + local, whole + _numel(parameter) * parameter.element_size()
        if parameter.requires_grad:
            local_trained += local
            whole_trained += _numel(parameter) * parameter.element_size()
    backend = job.parallel.backend if num_ranks > 1 or job.parallel.backend.startswith("zero") else "none"
    is_sharded = backend in ("fsdp2", "zero3")
    if is_sharded and weights == whole:  # not shared out yet
        weights, local_trained = -(-weights // num_ranks), -(-local_trained // num_ranks)
    gradients = local_trained
    optimizer = 2 * local_trained
    beside = {
        "none": 0,
        "ddp": whole_trained,  # buckets
        "fsdp2": (whole_trained if job.parallel.reduce == "step" else 0) + (0 if job.parallel.reshard_after_forward else whole),
        "zero0": whole_trained,
        "zero1": 2 * whole_trained // num_ranks,  # a flat copy of the shard's weights and gradients
        "zero2": 2 * whole_trained // num_ranks,
        "zero3": 2 * local_trained,
    }[backend]
    if backend in ("zero1", "zero2"):
        optimizer = 2 * whole_trained // num_ranks
    if job.parallel.offload and device_type != "cpu":
        optimizer = beside = 0
    publishes = is_first and device_type == "cpu"
    return StepMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        average=0 if job.ema.decay is None else local_trained,
        backend=beside,
        published=whole if publishes else 0,
    )


def step_memory(model: StepMemory, options: LossOptions, sizes: LossSizes, device: Device, limit_bytes: float) -> StepMemory:
    """Return what a rank holds in a step besides graphs. limit_bytes: what it may hold in all."""
    loss = loss_bytes(options, sizes, device, max(0.0, limit_bytes - model.total))
    return replace(model, embeddings=loss.embeddings, tile=loss.tile, kept_scores=loss.kept_scores)


def sizes_of(num_queries: int, num_passages: int, width: int, world: World) -> LossSizes:
    """Return the sizes of a step that brings the most on every rank. Collective: one small reduction."""
    queries, passages = world.all_max([num_queries, num_passages])
    ranks = world.num_ranks
    return LossSizes(queries=queries * ranks, passages=passages * ranks, width=width, num_ranks=ranks)


def _numel(parameter: Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed takes a parameter's values out of it


def _held(parameter: Tensor) -> int:
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.nbytes
    return parameter.to_local().nbytes if isinstance(parameter, DTensor) else parameter.nbytes
