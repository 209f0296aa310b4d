"""A GPU that trainer and miner share: how much of its memory a process has, said by whoever starts both.

The share is a limit of torch's allocator: a process that comes to it halves its batches, and the other side never notices.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

GPU_SHARE = "NEGPOOL_GPU_SHARE"  # in the environment of a process: its share of the memory of its GPU
# What CUDA itself and its libraries take of a GPU for each process, beside the allocator: half a GiB on an H200, and some room.
CONTEXT_BYTES = 3 * 2**28


def keep_to_share(device: "torch.device", environment: Mapping[str, str]) -> None:
    """Let this process take no more of a GPU than its share; without one, or on a CPU, nothing is limited."""
    given = environment.get(GPU_SHARE)
    if given is None or device.type != "cuda":
        return
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    fraction = allocator_fraction(float(given), total)
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    log.info("this process has %.1f of the %.1f GiB of its GPU, which it shares", fraction * total / 2**30, total / 2**30)


def allocator_fraction(share: float, total_bytes: int) -> float:
    """Return what the allocator may take of a GPU, so that it and what CUDA takes beside stay within a share."""
    return max(share / 2, share - CONTEXT_BYTES / total_bytes)


def free_of_share(device: "torch.device") -> int | None:
    """Return the bytes of a GPU that this process may still take; None on a CPU."""
    if device.type != "cuda":
        return None
    import torch

    free, total = torch.cuda.mem_get_info(device)
    own = int(torch.cuda.get_per_process_memory_fraction(device) * total) - torch.cuda.memory_reserved(device)
    return max(0, min(free, own))
