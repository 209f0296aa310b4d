"""The encoder under a parallel backend, and how its gradients are synchronised once a step.

Each backend is a function of its own below; which one is a setting. DeepSpeed owns its optimizer, so there `Parallel` says
how to update; everywhere else it is the plain optimizer's step.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, FSDP2Sync, GradientSync, NoSync
from gradcache.sync import reach_parameters
from trainer.errors import InputError
from trainer.job import ParallelSettings
from trainer.world import World


@dataclass(frozen=True)
class Parallel:
    """A model that is ready for steps on several ranks."""

    module: nn.Module  # what is called
    sync: GradientSync
    engine: Any = None  # DeepSpeed's, which owns the optimizer

    def full_gradients(self) -> dict[str, Tensor | None]:
        """Return whole copies of all trained parameters' gradients, on every rank. Collective."""
        return {name: self._full_gradient(p) for name, p in self._named_parameters() if p.requires_grad}

    def clear_gradients(self) -> None:
        """Forget all gradients. Collective under DeepSpeed, whose update with a learning rate of 0 it is."""
        if self.engine is None:
            self.module.zero_grad(set_to_none=True)
            return
        self.engine.step()
        self.engine.module.zero_grad(set_to_none=True)

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.module.named_parameters():
            yield name.removeprefix("module."), parameter

    def _full_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        if self.engine is not None and self.engine.zero_optimization_stage() > 0:
            from deepspeed.utils import safe_get_full_grad

            return safe_get_full_grad(parameter).float().clone()
        gradient = parameter.grad
        return gradient.full_tensor() if isinstance(gradient, DTensor) else None if gradient is None else gradient.clone()


def parallelize(encoder: nn.Module, world: World, settings: ParallelSettings) -> Parallel:
    """Return the encoder, on its device, under the backend. Collective. One rank needs none, but for DeepSpeed.

    Raises InputError where a backend is not installed.
    """
    encoder = encoder.to(world.device)
    if settings.backend.startswith("zero"):
        return _with_deepspeed(encoder, world, settings)
    if world.group is None:
        return Parallel(encoder, NoSync(encoder))
    if settings.backend == "fsdp2":
        return _with_fsdp2(encoder, settings)
    module = world.accelerator.prepare_model(encoder)
    assert isinstance(module, DistributedDataParallel)
    return Parallel(module, DDPSync(module))


def _with_fsdp2(encoder: nn.Module, settings: ParallelSettings) -> Parallel:
    """Shard each layer by itself, so that one layer's parameters are whole at a time, and the rest together."""
    for layer in layers_of(encoder):
        fully_shard(layer)
    module: FSDPModule = fully_shard(encoder)
    return Parallel(encoder, FSDP2Sync(module, reduce_every_chunk=settings.reduce == "chunk"))


def layers_of(encoder: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of a transformer: the members of its longest list of modules."""
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def _with_deepspeed(encoder: nn.Module, world: World, settings: ParallelSettings) -> Parallel:
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            f'parallel.backend="{settings.backend}" needs DeepSpeed; run: pip install "negpool[deepspeed]"'
        ) from error
    stage = int(settings.backend.removeprefix("zero"))
    on_host = {"device": "cpu"}
    zero: dict[str, Any] = {"stage": stage}
    if settings.offload:
        zero |= {"offload_optimizer": on_host, **({"offload_param": on_host} if stage == 3 else {})}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only logs with it
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    with _quiet():
        deepspeed.init_distributed(dist_backend="gloo" if world.device.type == "cpu" else "nccl", verbose=False)
        optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=0.0)
        engine, *_ = deepspeed.initialize(model=encoder, optimizer=optimizer, config=config)
    return Parallel(engine, DeepSpeedSync(engine, reduce_every_chunk=settings.reduce == "chunk"), engine)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's start-up messages, some hundred lines, from the terminal."""
    import logging

    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


class DeepSpeedSync:
    """A DeepSpeed engine of stage 0, 1, 2 or 3.

    Stages 1 to 3 coalesce the reductions of a step, which DeepSpeed can since 0.19.2; stage 0 reduces at its boundary.
    reduce_every_chunk: stages 2 and 3 reduce behind each chunk, so that gradients never exist whole.
    """

    def __init__(self, engine, reduce_every_chunk: bool = False):
        self._engine = engine
        self._stage = int(engine.zero_optimization_stage())
        self._every_chunk = reduce_every_chunk
        self._coalescing: contextlib.ExitStack | None = None  # open from a step's first part to its last
        # Stage 3 gathers parameters for each forward; the others communicate only in backwards, which then must match, too.
        self.communicates_in_forward = self._stage == 3 or reduce_every_chunk

    def hold(self) -> None:
        """Let backwards accumulate without reducing."""
        if self._stage > 0 and not self._every_chunk and self._coalescing is None:
            self._coalescing = contextlib.ExitStack()
            self._coalescing.enter_context(self._engine.coalesce_grad_reduction())

    def backward(self, surrogate: Tensor) -> None:
        """Run it through the engine, which counts backwards and scales float16 losses."""
        self._run(surrogate, is_boundary=False)

    def last_backward(self, surrogate: Tensor) -> None:
        """Run the last backward, and reduce."""
        self._run(surrogate, is_boundary=True)
        if self._coalescing is not None:
            coalescing, self._coalescing = self._coalescing, None
            coalescing.close()

    def gradient_scale(self) -> float:
        """Return W: DeepSpeed divides the sum by it."""
        return float(self._engine.dp_world_size)

    def can_forget_gradients(self) -> bool:
        """Return False: the engine has them in places of its own."""
        return False

    def forget_gradients(self) -> None:
        """Never called."""
        raise AssertionError("DeepSpeed's gradients are its own")

    def _run(self, surrogate: Tensor, is_boundary: bool) -> None:
        if self._stage == 0 or self._every_chunk:
            self._engine.set_gradient_accumulation_boundary(is_boundary)
        # Every parameter gets a gradient, also on a rank without rows: the ranks' reductions must have equal shapes.
        if is_boundary and self._stage < 3:
            surrogate = reach_parameters(surrogate, self._engine.module)
            for parameter in self._engine.module.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        if surrogate.requires_grad:
            self._engine.backward(surrogate)
        if self._stage == 3 and self._every_chunk and not is_boundary:
            # Counts the backward, so that the next one adds to it. DeepSpeed does it in a forward, but a kept graph has none.
            self._engine.optimizer.clear_backward_seen_flag()
