"""The encoder under FSDP2: every rank holds some rows of every parameter.

Each layer is gathered by itself, so that one layer's parameters are whole at a time; what stands outside of the layers
(embeddings, last norm, projection) is gathered together. In bfloat16 the layers' weights are gathered, and used, in bfloat16;
gradients are accumulated and reduced in float32. Autocast stays around for the rest: it finds the layers' weights in
bfloat16 already and keeps no copy of them, while states between layers, norms and pooling stay float32 as in one process.
What differs from autocast in one process is that norms see their own weights rounded to bfloat16.
"""

import types

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gradcache import FSDP2Sync
from trainer.encoder.backbone import layers_of
from trainer.encoder.towers import Encoder
from trainer.job import OptimSettings, ParallelSettings
from trainer.parallel import Parallel
from trainer.parts import Fragment
from trainer.world import World


def with_fsdp2(
    encoder: nn.Module, world: World, settings: ParallelSettings, optim: OptimSettings, dtype: torch.dtype
) -> Parallel:
    """Return the encoder, sharded. Collective. dtype: of the layers' weights in forward and backward."""
    # Inputs stay float32: rounded at every layer, what a deep model adds up layer by layer would lose most of its digits.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in encoder.layers() if isinstance(encoder, Encoder) else layers_of(encoder):
        if dtype != torch.float32:
            _widen_norms(layer)
        fully_shard(layer, mp_policy=policy, reshard_after_forward=settings.reshard_after_forward)
    module: FSDPModule = fully_shard(encoder)
    sync = FSDP2Sync(module, reduce_every_chunk=settings.reduce == "chunk", reshard_every_backward=settings.reshard_after_forward)
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


def _widen_norms(layer: nn.Module) -> None:
    """Let the norms of a layer compute in float32 also on a CPU, whose autocast leaves that to them."""
    for module in layer.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = types.MethodType(_norm_in_float32, module)  # type: ignore[method-assign]


def _norm_in_float32(norm: nn.LayerNorm, states: Tensor) -> Tensor:
    weight, bias = (None if parameter is None else parameter.float() for parameter in (norm.weight, norm.bias))
    return nn.functional.layer_norm(states.float(), norm.normalized_shape, weight, bias, norm.eps)
