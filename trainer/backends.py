"""Which backend shares a model over the ranks: one process, DDP and FSDP2 are here, DeepSpeed is in `zero.py`."""

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, FSDP2Sync, NoSync
from trainer.encoder.backbone import layers_of
from trainer.encoder.towers import Encoder
from trainer.job import OptimSettings, ParallelSettings
from trainer.parallel import Parallel
from trainer.parts import Fragment
from trainer.world import World


def is_sharded(settings: ParallelSettings, world: World) -> bool:
    """Tell whether no rank will be able to use the encoder by itself."""
    return settings.backend == "zero3" or (settings.backend == "fsdp2" and world.group is not None)


def parallelize(encoder: nn.Module, world: World, settings: ParallelSettings, optim: OptimSettings) -> Parallel:
    """Return the encoder, on its device, under the backend. Collective. One rank needs none, but for DeepSpeed.

    Raises InputError where a backend is not installed.
    """
    encoder = encoder.to(world.device)
    if settings.backend.startswith("zero"):
        from trainer.zero import with_deepspeed

        return with_deepspeed(encoder, world, settings, optim)
    if world.group is None:
        return Parallel(encoder, encoder, NoSync(encoder), optim, world)
    if settings.backend == "fsdp2":
        return _with_fsdp2(encoder, world, settings, optim)
    module = world.accelerator.prepare_model(encoder)
    assert isinstance(module, DistributedDataParallel)
    sync = DDPSync(module)
    sync.settle_buckets()
    return Parallel(encoder, module, sync, optim, world)


def _with_fsdp2(encoder: nn.Module, world: World, settings: ParallelSettings, optim: OptimSettings) -> Parallel:
    """Shard each layer by itself, so that one layer's parameters are whole at a time, and the rest together."""
    for layer in encoder.layers() if isinstance(encoder, Encoder) else layers_of(encoder):
        fully_shard(layer)
    module: FSDPModule = fully_shard(encoder)
    sync = FSDP2Sync(module, reduce_every_chunk=settings.reduce == "chunk")
    return _FSDP2(encoder, encoder, sync, optim, world)


class _FSDP2(Parallel):
    """Every rank holds some rows of every parameter."""

    is_sharded = True

    @property
    def num_shards(self) -> int:
        """All ranks hold one copy between them."""
        return self._world.num_ranks

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names, sharded: a forward without backward leaves some gathered."""
        for module in self.encoder.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().trained()

    def fragment(self, name: str, tensor: Tensor) -> Fragment:
        """Return this rank's rows of a tensor."""
        assert isinstance(tensor, DTensor)
        rank, num_ranks = tensor.device_mesh.get_local_rank(), tensor.device_mesh.size()
        rows_per_rank = -(-tensor.shape[0] // num_ranks)  # torch.chunk's, which fully_shard cuts by
        first_row = min(rank * rows_per_rank, tensor.shape[0])
        return Fragment(name, first_row * (tensor.numel() // tensor.shape[0]), tensor.numel(), tensor.to_local().view(-1))
