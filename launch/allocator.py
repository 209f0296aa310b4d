"""How PyTorch divides a GPU's memory, in processes that are ours: segments that grow.

Chunks differ in size from step to step. In segments of fixed size the gaps between tensors add up, until a chunk does not fit
into memory that is free; one that grows has few gaps. PyTorch reads its setting when CUDA starts, so it is set before that.
"""

from collections.abc import Mapping
from pathlib import Path

# Any of them is the user's word on the whole allocator. PyTorch 2.8 knows the second alone, 2.9 heeds only that for this setting.
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
GROWING = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
NVIDIA_DRIVER = Path("/proc/driver/nvidia")  # without it PyTorch 2.9 to 2.11 might warn, for nothing, that the name is an old one


def allocator_setting(environment: Mapping[str, str], has_gpu: bool) -> dict[str, str]:
    """Return what to add to the environment of this process: nothing without a GPU, or where the user has set the allocator."""
    return GROWING if has_gpu and not any(name in environment for name in NAMES) else {}
