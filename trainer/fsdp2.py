"""The encoder under FSDP2: every rank, or every rank of a node, holds some rows of every parameter.

Each layer is gathered by itself, so that one layer's parameters are whole at a time; what stands outside of the layers
(embeddings, last norm, projection) is gathered together. In bfloat16 the layers' weights are gathered, and used, in bfloat16;
gradients are accumulated and reduced in float32. Autocast stays around for the rest: it finds the layers' weights in
bfloat16 already and keeps no copy of them, while states between layers, norms and pooling stay float32 as in one process.
What differs from autocast in one process is that norms see their own weights rounded to bfloat16.
"""

import types

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gradcache import FSDP2Sync
from trainer.encoder.backbone import layers_of
from trainer.encoder.towers import Encoder
from trainer.errors import InputError
from trainer.job import OptimSettings, ParallelSettings
from trainer.parallel import Parallel
from trainer.parts import Fragment
from trainer.world import World


def with_fsdp2(
    encoder: nn.Module, world: World, settings: ParallelSettings, optim: OptimSettings, dtype: torch.dtype
) -> Parallel:
    """Return the encoder, sharded. Collective. dtype: of the layers' weights in forward and backward.

    Raises InputError, on every rank alike, where nodes cannot hold a copy each.
    """
    mesh = _mesh(world, settings)
    # Inputs stay float32: rounded at every layer, what a deep model adds up layer by layer would lose most of its digits.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in encoder.layers() if isinstance(encoder, Encoder) else layers_of(encoder):
        if dtype != torch.float32:
            _widen_norms(layer)
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=settings.reshard_after_forward)
    module: FSDPModule = fully_shard(encoder, mesh=mesh)
    if any(parameter.is_meta for parameter in encoder.parameters()):
        encoder.to_empty(device=world.device)  # only shards
    sync = FSDP2Sync(module, reduce_every_chunk=settings.reduce == "chunk", reshard_every_backward=settings.reshard_after_forward)
    return _FSDP2(encoder, sync, optim, world, mesh)


def _mesh(world: World, settings: ParallelSettings) -> DeviceMesh:
    """Return the ranks as (ranks,), or as (nodes, ranks of a node), where each node holds a copy. Collective."""
    num_ranks, per_node = world.num_ranks, world.ranks_per_node
    if settings.shard_group == "all":
        return init_device_mesh(world.device.type, (num_ranks,))
    most, fewest = world.all_max([per_node, -per_node])
    if most != -fewest or num_ranks % per_node:
        raise InputError(
            f'parallel.shard_group="node" needs equally many ranks on every node, found {num_ranks} in all and {-fewest} '
            f'to {most} on a node (LOCAL_WORLD_SIZE); launch as many everywhere, or set parallel.shard_group="all"'
        )
    # Ranks of a node follow each other, as launchers number them.
    return init_device_mesh(world.device.type, (num_ranks // per_node, per_node), mesh_dim_names=("node", "rank_of_node"))


class _FSDP2(Parallel):
    """Every rank holds some rows of every parameter; with a copy on each node, the same rank of other nodes holds the same."""

    is_sharded = True
    takes_weights = True

    def __init__(self, encoder: nn.Module, sync: FSDP2Sync, optim: OptimSettings, world: World, mesh: DeviceMesh):
        super().__init__(encoder, encoder, sync, optim, world)
        self._mesh = mesh

    @property
    def num_shards(self) -> int:
        """The ranks of a shard group hold one copy between them."""
        return self._mesh.size(-1)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names, sharded: a forward without backward leaves some gathered."""
        for module in self.encoder.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().trained()

    def fragment(self, name: str, tensor: Tensor) -> Fragment:
        """Return this rank's rows of a tensor."""
        assert isinstance(tensor, DTensor)
        # The last axis shards; the one before it, if there is one, repeats.
        rank = self._mesh.get_local_rank(self._mesh.ndim - 1)
        rows_per_rank = -(-tensor.shape[0] // self.num_shards)  # torch.chunk's, which fully_shard cuts by
        first_row = min(rank * rows_per_rank, tensor.shape[0])
        return Fragment(name, first_row * (tensor.numel() // tensor.shape[0]), tensor.numel(), tensor.to_local().view(-1))


def _widen_norms(layer: nn.Module) -> None:
    """Let the norms of a layer compute in float32 also on a CPU, whose autocast leaves that to them."""
    for module in layer.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = types.MethodType(_norm_in_float32, module)  # type: ignore[method-assign]


def _norm_in_float32(norm: nn.LayerNorm, states: Tensor) -> Tensor:
    weight, bias = (None if parameter is None else parameter.float() for parameter in (norm.weight, norm.bias))
    return nn.functional.layer_norm(states.float(), norm.normalized_shape, weight, bias, norm.eps)
