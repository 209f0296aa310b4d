"""What a process may still take of a GPU, which another process may share with it; and devices that only a plan knows."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AbsentDevice:
    """A device that this machine need not have, as far as it decides about memory: for a plan of other machines."""

    type: str  # as of torch.device: "cuda" or "cpu"
    memory_bytes: int


Device = torch.device | AbsentDevice


def free_bytes(device: Device) -> int:
    """Return what this process can still take: what nobody has, and what its own allocator keeps for reuse, within its share.

    Of an absent device: all of it.
    """
    if isinstance(device, AbsentDevice):
        return device.memory_bytes
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return max(0, min(free + reserved, share) - allocated)


def total_bytes(device: Device) -> int:
    """Return the memory of a GPU, or of this host."""
    if isinstance(device, AbsentDevice):
        return device.memory_bytes
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
