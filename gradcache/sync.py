"""When gradients are synchronised over the ranks: once a step, in its last backward."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class GradientSync(Protocol):
    """How a parallel backend is told what a step does. A step calls `hold` and `last_backward` once on every rank."""

    def hold(self) -> None:
        """Before the first forward of a step: no backward communicates from here on."""

    def last_backward(self, surrogate: Tensor) -> None:
        """Run the last backward of a step and synchronise what all have accumulated. Collective.

        surrogate: a scalar; without a graph on a rank that has nothing to encode.
        """

    def gradient_scale(self) -> float:
        """Return the factor that makes the synchronised gradient the sum over the ranks."""


class NoSync:
    """One process."""

    def hold(self) -> None:
        """Do nothing."""

    def last_backward(self, surrogate: Tensor) -> None:
        """Run it like any other."""
        if surrogate.requires_grad:
            surrogate.backward()

    def gradient_scale(self) -> float:
        """Return 1: there is nothing to average."""
        return 1.0


class DDPSync:
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
        self._modules = modules

    def hold(self) -> None:
        """Keep the reducers from expecting the next backward. Collective in the second step: buckets are rebuilt."""
        for module in self._modules:
            module.require_backward_grad_sync = False
            # DDP does it in the next forward, which a rank without rows never makes.
            module.reducer._rebuild_buckets()

    def last_backward(self, surrogate: Tensor) -> None:
        """Run the last backward with the reducers armed.

        One module is reduced while the backward runs. Several are reduced one after the other behind it: in one backward
        their reductions would start in the order of that rank's graph, which differs where a rank has no rows.
        """
        if len(self._modules) == 1:
            self._arm(self._modules[0], surrogate).backward()
            return
        if surrogate.requires_grad:
            surrogate.backward()
        for module in self._modules:
            self._arm(module, surrogate.new_zeros(())).backward()

    def _arm(self, module: DistributedDataParallel, surrogate: Tensor) -> Tensor:
        """Return what the module's synchronising backward starts from.

        DDP arms itself in the forward that precedes a backward. Here the forward of the last backward may date from
        before the loss, others ran backward in between, and a rank without rows made none.
        """
        start: Tensor = _Reach.apply(surrogate, *(p for p in module.parameters() if p.requires_grad))
        module.require_backward_grad_sync = True
        module.reducer.prepare_for_backward([start])
        return start

    def gradient_scale(self) -> float:
        """Return W: DDP divides the sum by it."""
        return float(self._modules[0].process_group.size())


class _Reach(torch.autograd.Function):
    """The surrogate itself, from which backward also reaches all parameters, with nothing to add to their gradients.

    It lets DDP's hooks fire for parameters that the last chunk does not use. Unlike a sum of zeros it costs no memory.
    """

    @staticmethod
    def forward(ctx, surrogate: Tensor, *parameters: Tensor) -> Tensor:
        ctx.num_parameters = len(parameters)
        return surrogate.view_as(surrogate)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, *[None] * ctx.num_parameters
