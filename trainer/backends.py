"""Which backend shares a model over the ranks: one process and DDP are here, FSDP2 is in `fsdp2.py`, DeepSpeed in `zero.py`."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, NoSync
from trainer.fsdp2 import with_fsdp2
from trainer.job import OptimSettings, ParallelSettings
from trainer.parallel import Parallel
from trainer.world import World


def is_sharded(settings: ParallelSettings, world: World) -> bool:
    """Tell whether no rank will be able to use the encoder by itself."""
    return settings.backend == "zero3" or (settings.backend == "fsdp2" and world.group is not None)


def parallelize(
    encoder: nn.Module,
    world: World,
    settings: ParallelSettings,
    optim: OptimSettings,
    encode_dtype: torch.dtype = torch.float32,
) -> Parallel:
    """Return the encoder, on its device, under the backend. Collective. One rank needs none, but for DeepSpeed.

    An encoder on the meta device is left with weights that `take_weights` has to fill; only FSDP2 takes one.
    encode_dtype: what a step encodes in; of use to backends that gather weights.
    Raises InputError where a backend is not installed.
    """
    if not any(parameter.is_meta for parameter in encoder.parameters()):
        encoder = encoder.to(world.device)
    if settings.backend.startswith("zero"):
        from trainer.zero import with_deepspeed

        return with_deepspeed(encoder, world, settings, optim)
    if world.group is None:
        return Parallel(encoder, encoder, NoSync(encoder), optim, world)
    if settings.backend == "fsdp2":
        return with_fsdp2(encoder, world, settings, optim, encode_dtype)
    # BERT-type buffers never change; broadcasting them between two forwards would invalidate the first one's graph.
    module = DistributedDataParallel(encoder, broadcast_buffers=False)
    sync = DDPSync(module)
    sync.settle_buckets()
    return Parallel(encoder, module, sync, optim, world)
