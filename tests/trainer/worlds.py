"""A `World` for ranks that `run_ranks` started, or for this process alone."""

import torch
import torch.distributed as dist

from trainer.world import World


def world_of(rank: int = 0, ranks_per_node: int | None = None) -> World:
    """Return this rank's world on the CPU, over the default group if there is one."""
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    num_ranks = dist.get_world_size() if group else 1
    return World(rank, num_ranks, torch.device("cpu"), group, group, ranks_per_node or num_ranks)
