"""The encoder under DeepSpeed, ZeRO stage 0 to 3. DeepSpeed owns the optimizer that it shards."""

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradcache import NoSync
from gradcache.sync import reach_parameters
from trainer.deepspeed_file import read_deepspeed
from trainer.errors import InputError
from trainer.job import OptimSettings, ParallelSettings
from trainer.optim import moments_of
from trainer.parallel import MOMENTS, Parallel, Update
from trainer.parts import Fragment
from trainer.world import World


def with_deepspeed(encoder: nn.Module, world: World, settings: ParallelSettings, optim: OptimSettings) -> Parallel:
    """Return the encoder under an engine. Collective. Raises InputError where DeepSpeed is not installed."""
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            f'parallel.backend="{settings.backend}" needs DeepSpeed; run: pip install "negpool[deepspeed]"'
        ) from error
    with _quiet():
        deepspeed.init_distributed(dist_backend="gloo" if world.device.type == "cpu" else "nccl", verbose=False)
        return _Zero(encoder, settings, optim, world)


def engine_config(settings: ParallelSettings, optim: OptimSettings) -> dict[str, Any]:
    """Return what DeepSpeed is told."""
    stage = int(settings.backend.removeprefix("zero"))
    given = {} if settings.deepspeed is None else read_deepspeed(settings.deepspeed, stage)
    on_host = {"device": "cpu"}
    zero: dict[str, Any] = {"stage": stage}
    if settings.offload:
        zero |= {"offload_optimizer": on_host, **({"offload_param": on_host} if stage == 3 else {})}
    return given | {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only logs with it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm if stage > 0 else 0.0,
        "zero_optimization": given.get("zero_optimization", {}) | zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class _Zero(Parallel):
    """An engine. From stage 1 on a rank holds runs of the flattened parameters, wherever their edges fall."""

    def __init__(self, encoder: nn.Module, settings: ParallelSettings, optim: OptimSettings, world: World):
        import deepspeed

        super().__init__(encoder, encoder, NoSync(), optim, world)
        self._engine, *_ = deepspeed.initialize(model=encoder, optimizer=self.optimizer, config=engine_config(settings, optim))
        self._stage = int(settings.backend.removeprefix("zero"))
        self.is_sharded = self._stage == 3
        self.module = self._engine
        self.sync = DeepSpeedSync(self._engine, reduce_every_chunk=settings.reduce == "chunk")
        self._is_wanted = True  # the update that comes next
        if self._stage > 0:
            self._let_updates_be_unwanted()
        self._make_moments()

    @property
    def num_shards(self) -> int:
        """All ranks hold one copy of the moments between them, but in stage 0."""
        return 1 if self._stage == 0 else self._world.num_ranks

    def update(self, scaler: torch.amp.GradScaler, watched: Tensor | None = None) -> Update:
        """Let the engine clip and step; DeepSpeed waits for the device, too. The scaler is one that does nothing."""
        if self._stage == 0:  # DeepSpeed clips its gradients, too, but keeps their norm to itself
            found = self._read(torch.nn.utils.clip_grad_norm_(self.trained().values(), self._max_norm), watched)
            if not found.is_made:  # what has no gradient is not stepped
                self._engine.module.zero_grad(set_to_none=True)
            self._step()
            return found
        others = [] if watched is None else watched.tolist()
        self._step(is_wanted=all(map(math.isfinite, others)))
        return Update(float(self._engine.get_global_grad_norm()), self._engine.was_step_applied(), others)

    def _step(self, is_wanted: bool = True) -> None:
        self._is_wanted = is_wanted
        self._engine.step()
        self._is_wanted = True
        self._engine.module.zero_grad(set_to_none=True)

    def clear_gradients(self) -> None:
        """Forget all gradients. Collective: it is an update that is not wanted."""
        if self._stage == 0:
            self._engine.module.zero_grad(set_to_none=True)
        self._step(is_wanted=False)

    def _let_updates_be_unwanted(self) -> None:
        """Have stages 1 to 3 leave out an update that is not wanted as they leave out one whose norm is not finite.

        Since 0.19.8 they do that by themselves, on all ranks alike, and say so here, between the norm and the first step.
        """
        zero = self._engine.optimizer
        update_scale = zero._update_scale

        def update_scale_or_skip(has_overflow: bool = False) -> None:
            zero.overflow = has_overflow or not self._is_wanted
            update_scale(zero.overflow)

        zero._update_scale = update_scale_or_skip

    def full_gradients(self) -> dict[str, Tensor | None]:
        """Return whole copies of all trained parameters' gradients, on every rank. Collective."""
        if self._stage == 0:
            return super().full_gradients()
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(parameter).float().clone() for name, parameter in self.trained().items()}

    def whole_parameters(self, with_frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield the trained parameters, or all, whole, one after the other. Collective in stage 3."""
        if self._stage < 3:
            yield from super().whole_parameters(with_frozen)
            return
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in self.encoder.named_parameters() if with_frozen else self.trained().items():
            with GatheredParameters([parameter]):
                yield name, parameter.detach()

    def fragments(self) -> Iterator[Fragment]:
        """Yield what this rank holds of weights and moments. In stages 1 to 3 only moments take effect when copied into."""
        if self._stage == 0:
            yield from super().fragments()
            return
        for name, parameter in self.trained().items():
            yield from self._runs_in_groups(name, parameter) if self._stage < 3 else self._runs_of_stage_3(name, parameter)

    def _make_moments(self) -> None:
        """Make AdamW's state now: DeepSpeed links it to parameters behind the first group's first step, and no other group's."""
        zero = self._engine.optimizer
        if self._stage > 0:
            for partition in zero.single_partition_of_fp32_groups if self._stage < 3 else zero.fp32_partitioned_groups_flat:
                moments_of(self.optimizer, partition)
        if self._stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()

    def _runs_in_groups(self, name: str, parameter: nn.Parameter) -> Iterator[Fragment]:
        """Yield a parameter's run in this rank's partition of its group; none where it lies on other ranks."""
        held = parameter._hp_mapping  # type: ignore[attr-defined]
        if held is None:
            return
        start = held.lp_fragment_address.start
        yield Fragment(f"parameter.{name}", start, parameter.numel(), held.hp_fragment.detach())
        for kind in MOMENTS:
            yield Fragment(f"{kind}.{name}", start, parameter.numel(), held.get_optim_state_fragment(kind))

    def _runs_of_stage_3(self, name: str, parameter: nn.Parameter) -> Iterator[Fragment]:
        """Yield this rank's equal share of a parameter; the last ranks' may be padding."""
        numel, zero = parameter.ds_numel, self._engine.optimizer  # type: ignore[attr-defined]
        for kind in (None, *MOMENTS):
            values, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=kind)
            start = min(torch.distributed.get_rank() * len(values), numel)
            yield Fragment(f"{kind or 'parameter'}.{name}", start, numel, values.detach()[: numel - start])


class DeepSpeedSync:
    """A DeepSpeed engine of stage 0, 1, 2 or 3.

    Stages 1 to 3 coalesce the reductions of a step, which DeepSpeed can since 0.19.2; stage 0 reduces at its boundary.
    reduce_every_chunk: stages 2 and 3 reduce behind each chunk, so that gradients never exist whole.
    """

    def __init__(self, engine, reduce_every_chunk: bool = False):
        self._engine = engine
        self.num_forgotten = 0
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's start-up messages, some hundred lines, from the terminal."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
