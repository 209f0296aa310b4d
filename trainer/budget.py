"""Chunk tokens and kept graphs of a run: what the job says, or what a probe of the first batch finds to fit.

The draws of dropout follow the chunks, so a resumed run goes the way of an undisturbed one only with the budget that it had:
checkpoints keep it, also one that was halved. It is found anew where the job's `chunk` section, the number of ranks or the
memory of their devices is another than it was found for; batches stay the same then, draws and rounding do not.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gradcache import Batch, Budget, probe_budget
from gradcache.tiles import TILE_BYTES
from trainer.errors import InputError
from trainer.job import ChunkSettings
from trainer.world import World

CPU_BUDGET = Budget(4096, 0)  # the fastest chunk on CPUs; a CPU says nothing of the memory that one may take
FREE_SHARE = 0.9  # of a GPU's free memory: allocators need some room between blocks


@dataclass(frozen=True)
class RunBudget:
    """The budget of a run's steps, the same on every rank, and what it was found for. JSON holds both."""

    chunk_tokens: int
    keep_graphs: int | Literal["all"]
    found_for: dict[str, Any]

    def halved(self) -> "RunBudget":
        """Return the budget after a chunk has not fitted."""
        return replace(self, **asdict(Budget(self.chunk_tokens, self.keep_graphs).halved()))


def kept_budget(kept: RunBudget | None, settings: ChunkSettings, world: World) -> RunBudget | None:
    """Return the budget that a checkpoint kept, or None where it was found for something else. Collective."""
    return kept if kept is not None and kept.found_for == _circumstances(settings, world) else None


def find_budget(settings: ChunkSettings, batch: Batch, encoder: nn.Module, world: World) -> RunBudget:
    """Return the budget of this run's steps, the same on every rank. Collective. Raises InputError if nothing fits."""
    found = _step_budget(settings, batch, encoder, world)
    return RunBudget(found.chunk_tokens, found.keep_graphs, _circumstances(settings, world))


def _circumstances(settings: ChunkSettings, world: World) -> dict[str, Any]:
    """Return what a budget is found for, the same on every rank. Collective."""
    is_gpu = world.device.type == "cuda"
    memory = torch.cuda.get_device_properties(world.device).total_memory if is_gpu else 0
    least_bytes = -world.all_max([-memory])[0]
    return {"chunk": asdict(settings), "num_ranks": world.num_ranks, "device": world.device.type, "least_bytes": least_bytes}


def _step_budget(settings: ChunkSettings, batch: Batch, encoder: nn.Module, world: World) -> Budget:
    found = CPU_BUDGET
    if "auto" in (settings.tokens, settings.keep_graphs) and (settings.memory_gib is not None or world.device.type == "cuda"):
        found = _probed(settings, batch, encoder, world)
    if settings.tokens != "auto":
        found = replace(found, chunk_tokens=settings.tokens)
    if settings.keep_graphs != "auto":
        found = replace(found, keep_graphs=settings.keep_graphs)
    return found


def _probed(settings: ChunkSettings, batch: Batch, encoder: nn.Module, world: World) -> Budget:
    """Return what fits into every rank's memory, behind all that a step holds besides graphs."""
    weights, rest = held_bytes(encoder)
    if settings.memory_gib is not None:
        limit, held = settings.memory_gib * 2**30, weights + rest
    else:
        limit, held = torch.cuda.mem_get_info(world.device)[0] * FREE_SHARE, rest
    width = getattr(encoder, "width", 1024)
    pool = world.num_ranks * len(batch.keys) * width * 4 * 4  # embeddings and gradients, gathered and in transit
    limit -= held + pool + 2 * TILE_BYTES[world.device.type]
    refusal, numbers = "", [-(2**31), -(2**31)]
    try:
        if len(batch.keys):  # a rank without rows, in the last batch of an epoch, takes what the others find
            budget = probe_budget(batch.towers, int(limit), world.device)
            numbers = [-budget.chunk_tokens, -(2**31 if budget.keep_graphs == "all" else budget.keep_graphs)]
    except ValueError as error:
        refusal = str(error)
    is_refused, tokens, kept = world.all_max([int(bool(refusal)), *numbers])
    if is_refused:
        raise InputError(refusal or "another rank has too little memory for one text; set chunk.memory_gib higher")
    return Budget(-tokens, "all" if -kept == 2**31 else -kept)


def held_bytes(encoder: nn.Module) -> tuple[int, int]:
    """Return what a rank holds of the weights, and what it will hold of AdamW's moments and of gradients."""
    weights = rest = 0
    for parameter in encoder.parameters():
        local = parameter.to_local().nbytes if isinstance(parameter, DTensor) else parameter.nbytes
        weights += local
        rest += 2 * local + parameter.numel() * parameter.element_size()  # FSDP2's gradients wait whole for their one reduction
    return weights, rest
