"""When gradients are synchronised over the ranks: once a step, in its last backward."""

from collections.abc import Iterable
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


class GradientSync(Protocol):
    """How a parallel backend is told what a step does.

    A step calls `hold` and `last_backward` once on every rank, `backward` as often as it has other chunks. A step of several
    parts calls `hold` before each of them, and `last_backward` in the last one.
    """

    communicates_in_forward: bool  # every rank must then make as many forwards and backwards, in one order
    num_forgotten: int  # times that gradients were taken back, because a backward ran out of memory; a step resets it

    def hold(self) -> None:
        """Called before the first forward of a step or part: from here on no backward reduces gradients."""

    def backward(self, surrogate: Tensor) -> None:
        """Run a backward that is not the last one of a step. surrogate: a scalar; without a graph for a frozen tower."""

    def last_backward(self, surrogate: Tensor) -> None:
        """Run the last backward of a step and synchronise what all have accumulated. Collective.

        surrogate: a scalar; without a graph on a rank that has nothing to encode.
        """

    def gradient_scale(self) -> float:
        """Return the factor that makes the synchronised gradient the sum over the ranks."""

    def can_forget_gradients(self) -> bool:
        """Return whether all gradients are of this part of the step and nothing of them has been communicated."""

    def forget_gradients(self) -> None:
        """Take back what the backwards since `hold` have accumulated on this rank."""


class NoSync:
    """One process. The modules are needed only to repeat a backward that ran out of memory."""

    communicates_in_forward = False

    def __init__(self, *modules: nn.Module):
        self.num_forgotten = 0
        self._modules = modules
        self._started_clean = False

    def hold(self) -> None:
        """Note whether there are gradients of earlier steps or parts."""
        self._started_clean = bool(self._modules) and all(p.grad is None for p in self._parameters())

    def backward(self, surrogate: Tensor) -> None:
        """Run it."""
        if surrogate.requires_grad:
            surrogate.backward()

    def last_backward(self, surrogate: Tensor) -> None:
        """Run it like any other."""
        self.backward(surrogate)

    def gradient_scale(self) -> float:
        """Return 1: there is nothing to average."""
        return 1.0

    def can_forget_gradients(self) -> bool:
        """Return whether there were no gradients before this part of the step."""
        return self._started_clean

    def forget_gradients(self) -> None:
        """Set all gradients to None."""
        self.num_forgotten += 1
        for parameter in self._parameters():
            parameter.grad = None

    def _parameters(self) -> Iterable[nn.Parameter]:
        return (p for module in self._modules for p in module.parameters())


class DDPSync(NoSync):
    """DistributedDataParallel modules: one for each tower, in their order, or one for all.

    Every parameter that needs a gradient is reduced, whichever of them the last chunk uses. One that no rank uses gets a
    gradient of zeros, or None as ever with `find_unused_parameters=True`.
    """

    def __init__(self, *modules: DistributedDataParallel):
        """Raise ValueError for modules that communicate, or count iterations, in every forward."""
        for module in modules:
            if module.broadcast_buffers or module.static_graph:
                raise ValueError(
                    f"DistributedDataParallel has broadcast_buffers={module.broadcast_buffers} and static_graph="
                    f"{module.static_graph}; a step of many forwards, and of none on some ranks, needs both False"
                )
        super().__init__(*modules)
        self._wrapped = modules
        self._has_communicated = False

    def settle_buckets(self) -> None:
        """Lay the buckets out for good, before the first step. Collective: one reduction of zeros.

        Otherwise DDP lays them out anew after its first step, in the order in which gradients came. The place in a bucket
        decides in which order the values of three or more ranks are summed, and so how they are rounded: a run that goes on
        from a checkpoint would not go the way of an undisturbed one to the bit.
        """
        for module in self._wrapped:
            start = next(module.parameters()).new_zeros(())
            # One in the other, so that gradients come from the last parameter to the first, as nearly in a real backward.
            for parameter in (p for p in module.parameters() if p.requires_grad):
                start = _Reach.apply(start, parameter)
            module.require_backward_grad_sync = True
            module.reducer.prepare_for_backward([start])
            start.backward()
            module.reducer._rebuild_buckets()
            module.zero_grad(set_to_none=True)

    def hold(self) -> None:
        """Keep the reducers from expecting the next backward. Collective in the second step: buckets not settled are rebuilt."""
        for module in self._wrapped:
            module.require_backward_grad_sync = False
            # DDP does it in the next forward, which a rank without rows never makes.
            module.reducer._rebuild_buckets()
        self._has_communicated = False
        super().hold()

    def last_backward(self, surrogate: Tensor) -> None:
        """Run the last backward with the reducers armed.

        One module is reduced while the backward runs. Several are reduced one after the other behind it: in one backward
        their reductions would start in the order of that rank's graph, which differs where a rank has no rows.
        """
        if len(self._wrapped) == 1:
            self._arm(self._wrapped[0], surrogate).backward()
            return
        self.backward(surrogate)
        for module in self._wrapped:
            self._arm(module, surrogate.new_zeros(())).backward()

    def _arm(self, module: DistributedDataParallel, surrogate: Tensor) -> Tensor:
        """Return what the module's synchronising backward starts from.

        DDP arms itself in the forward that precedes a backward. Here the last backward may belong to a forward from before the
        loss, other backwards ran in between, and a rank without rows made no forward at all.
        """
        start = reach_parameters(surrogate, module)
        self._has_communicated = True
        module.require_backward_grad_sync = True
        module.reducer.prepare_for_backward([start])
        return start

    def gradient_scale(self) -> float:
        """Return W: DDP divides the sum by it."""
        return float(self._wrapped[0].process_group.size())

    def can_forget_gradients(self) -> bool:
        """Return False where the reducers were armed, too: some gradients may be on their way."""
        return super().can_forget_gradients() and not self._has_communicated


class FSDP2Sync:
    """Modules under `torch.distributed.fsdp.fully_shard`: one for each tower, in their order, or one for all.

    reduce_every_chunk: reduce-scatter behind each chunk instead of once a step. The gradients that wait for the one
    reduction are not sharded: a copy of all parameters. Reducing every chunk keeps only a shard, for the traffic.
    reshard_every_backward: False keeps parameters whole until a step's last backward; for modules that `fully_shard` made with
    `reshard_after_forward=False`, which then gather once a step instead of once a chunk.
    """

    communicates_in_forward = True
    num_forgotten = 0

    def __init__(self, *modules: FSDPModule, reduce_every_chunk: bool = False, reshard_every_backward: bool = True):
        self._modules = modules
        self._reduce_every_chunk = reduce_every_chunk
        self._reshard_every_backward = reshard_every_backward
        # Looked up now: in a step all parameters may be whole, and tell nothing of their mesh.
        parameters = [p for module in modules for p in cast(nn.Module, module).parameters()]
        (mesh,) = {p.device_mesh for p in parameters if isinstance(p, DTensor)}
        self._num_ranks = float(mesh.size())

    def hold(self) -> None:
        """Let backwards accumulate without reducing."""
        for module in self._modules:
            module.set_requires_gradient_sync(self._reduce_every_chunk)
            module.set_reshard_after_backward(self._reshard_every_backward)

    def backward(self, surrogate: Tensor) -> None:
        """Run it; it gathers parameters."""
        if surrogate.requires_grad:
            surrogate.backward()

    def last_backward(self, surrogate: Tensor) -> None:
        """Run the last backward; FSDP reduces what has accumulated, of one module while it runs, of several behind it."""
        for module in self._modules:
            module.set_reshard_after_backward(True)
        if len(self._modules) == 1:
            self._modules[0].set_requires_gradient_sync(True)
            self.backward(surrogate)
            return
        self.backward(surrogate)
        for module in self._modules:
            module.set_requires_gradient_sync(True)
            # What FSDP runs at the end of a backward: only the last chunk's tower is in the one above.
            module._get_fsdp_state()._root_post_backward_final_callback()

    def gradient_scale(self) -> float:
        """Return W: FSDP divides the sum by it."""
        return self._num_ranks

    def can_forget_gradients(self) -> bool:
        """Return False: other ranks would not run the backwards again."""
        return False

    def forget_gradients(self) -> None:
        """Never called."""
        raise AssertionError("FSDP gradients are shared with other ranks")


def reach_parameters(surrogate: Tensor, module: nn.Module) -> Tensor:
    """Return the surrogate with a graph that also reaches all trained parameters, with nothing to add to their gradients.

    It lets a backend's hooks fire for parameters that the last chunk does not use. Unlike a sum of zeros it costs no memory.
    """
    return _Reach.apply(surrogate, *(p for p in module.parameters() if p.requires_grad))


class _Reach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, surrogate: Tensor, *parameters: Tensor) -> Tensor:
        ctx.num_parameters = len(parameters)
        return surrogate.view_as(surrogate)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, *[None] * ctx.num_parameters
