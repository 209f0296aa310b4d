"""What a process may still take of a GPU, which another process may share with it."""

import torch


def free_bytes(device: torch.device) -> int:
    """Return what this process can still take: what nobody has, and what its own allocator keeps for reuse, within its share."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return max(0, min(free + reserved, share) - allocated)
