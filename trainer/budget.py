"""Chunk tokens and kept graphs of a run: what the job says, or what a probe of the first batch finds to fit.

The draws of dropout follow the chunks, so a resumed run goes the way of an undisturbed one only with the budget that it had:
checkpoints keep it, also one that was halved. It is found anew where the number of ranks, what each may take of its device, or
whatever of the job decides about memory is another than it was found for: sections chunk, loss and parallel, an average, the
batch. Batches stay the same then, draws and rounding do not.
"""

import json
import logging
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from gradcache import Batch, Budget, LossOptions
from gradcache.budget import plan_graphs
from gradcache.free import free_bytes
from trainer.errors import InputError
from trainer.job import TrainJob
from trainer.step_memory import GIB, model_memory, sizes_of, step_memory
from trainer.world import World

log = logging.getLogger(__name__)

CPU_BUDGET = Budget(4096, 0)  # the fastest chunk on CPUs; a CPU says nothing of the memory that one may take
FREE_SHARE = 0.9  # of a GPU's free memory: allocators need some room between blocks
# Of section loss, what leaves the memory of a step as it is.
NO_MEMORY = ("temperature", "learn_temperature", "min_temperature", "width_weights")


@dataclass(frozen=True)
class RunBudget:
    """The budget of a run's steps, the same on every rank, and what it was found for. JSON holds both."""

    chunk_tokens: int
    keep_graphs: int | Literal["all"]
    found_for: dict[str, Any]

    def halved(self) -> "RunBudget":
        """Return the budget after a chunk has not fitted."""
        return replace(self, **asdict(Budget(self.chunk_tokens, self.keep_graphs).halved()))


def kept_budget(kept: RunBudget | None, job: TrainJob, world: World) -> RunBudget | None:
    """Return the budget that a checkpoint kept, or None where it was found for something else. Collective."""
    return kept if kept is not None and kept.found_for == _circumstances(job, world) else None


def find_budget(job: TrainJob, loss: LossOptions, batch: Batch, encoder: nn.Module, world: World) -> RunBudget:
    """Return the budget of this run's steps, the same on every rank. Collective. Raises InputError if nothing fits.

    loss, batch: of the first step.
    """
    settings, found = job.chunk, CPU_BUDGET
    if "auto" in (settings.tokens, settings.keep_graphs) and (settings.memory_gib is not None or world.device.type == "cuda"):
        found = _probed(job, loss, batch, encoder, world)
    if settings.tokens != "auto":
        found = replace(found, chunk_tokens=settings.tokens)
    if settings.keep_graphs != "auto":
        found = replace(found, keep_graphs=settings.keep_graphs)
    return RunBudget(found.chunk_tokens, found.keep_graphs, _circumstances(job, world))


def _circumstances(job: TrainJob, world: World) -> dict[str, Any]:
    """Return what a budget is found for, as JSON holds it, the same on every rank. Collective."""
    least_bytes = -world.all_max([-own_bytes(world.device)])[0]
    sections = {name: asdict(getattr(job, name)) for name in ("chunk", "loss", "parallel", "precision")}
    # What leaves the memory as it is.
    for section, names in {"loss": NO_MEMORY, "parallel": ("timeout_s", "deepspeed")}.items():
        for name in names:
            sections[section].pop(name, None)
    found = sections | {
        "averages": job.ema.decay is not None,
        "batch": [job.batch.queries, job.negatives.per_query],
        "num_ranks": world.num_ranks,
        "device": world.device.type,
        "least_bytes": least_bytes,
    }
    return json.loads(json.dumps(found, default=str))


def own_bytes(device: torch.device) -> int:
    """Return what a process may take of a GPU that others may share; 0 on a CPU, which says nothing of that."""
    if device.type != "cuda":
        return 0
    total = torch.cuda.get_device_properties(device).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


def _probed(job: TrainJob, loss: LossOptions, batch: Batch, encoder: nn.Module, world: World) -> Budget:
    """Return what fits into every rank's memory, beside all that a step holds besides graphs, and print the plan."""
    settings, device = job.chunk, world.device
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    given = settings.memory_gib
    limit = given * GIB if given is not None else FREE_SHARE * (allocated + free_bytes(device))
    sizes = sizes_of(batch.num_queries, batch.num_passages, getattr(encoder, "width", 1024), world)
    memory = step_memory(model_memory(encoder, job, world.num_ranks, device.type, world.speaks), loss, sizes, device, limit)
    # A process may hold more already than the plan knows of.
    room = limit - memory.total - max(0, allocated - memory.lasting)
    refusal, numbers = "", [-(2**31), -(2**31)]
    try:
        if len(batch.keys):  # a rank without rows, in the last batch of an epoch, takes what the others find
            budget, chunk_bytes, kept_bytes = plan_graphs(batch.towers, room, device)
            numbers = [-budget.chunk_tokens, -(2**31 if budget.keep_graphs == "all" else budget.keep_graphs)]
            memory = replace(memory, chunk=int(chunk_bytes), kept_graphs=int(kept_bytes))
    except ValueError as error:
        refusal = f"of {limit / GIB:.2f} GiB a step takes {memory}; {error}"
    is_refused, tokens, kept = world.all_max([int(bool(refusal)), *numbers])
    if is_refused:
        raise InputError(refusal or "another rank has too little memory for one text; set chunk.memory_gib higher")
    log.info("memory of a rank, %.2f GiB of %.2f: %s", memory.total / GIB, limit / GIB, memory)
    return Budget(-tokens, "all" if -kept == 2**31 else -kept)
