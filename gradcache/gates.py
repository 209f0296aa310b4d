"""What differs between the versions of torch that are supported, 2.8 and newer, and what their warnings say of it.

Every such gate stands here, with the version from which on it can go. pyproject.toml has the oldest version itself.
"""

import contextlib
import warnings

import torch
import torch.distributed as dist

# Until 2.13 is the oldest: it renamed both, and warns of the old names at every call.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def quiet_torch() -> None:
    """Keep warnings that are of no use to the person who trains out of this process.

    DDP's, until 2.13 is the oldest: it renamed an argument of DDP, and the old name is the one that 2.8 knows, too.
    """
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)


def backwards_compiled_at_once() -> contextlib.AbstractContextManager:
    """Have torch.compile make a graph's backward with its forward during the block, where this torch can, and not when it is run.

    A setting of torch's that not all versions have.
    """
    config, name = torch._functorch.config, "force_non_lazy_backward_lowering"
    return config.patch({name: True}) if hasattr(config, name) else contextlib.nullcontext()
