"""A moving average of the trained parameters, for evaluation and for what is published.

It holds one more copy of the trained parameters, of this rank's shards where they are sharded. While averages are swapped
in they lie in the parameters themselves, so whatever encodes, saves or hashes the model sees them; swapping moves bits and
changes none.
Source: Polyak & Juditsky 1992; the slower start is TensorFlow's ExponentialMovingAverage with num_updates.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.errors import InputError

NUM_UPDATES = "num_updates"  # its name among the tensors of a state


@dataclass(frozen=True, kw_only=True)
class EmaSettings:
    """Section `ema`: a moving average of the weights."""

    decay: float | None = None  # share of the average that stays with each step, as 0.999; None: no average

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise InputError(f"ema.decay={self.decay} must lie between 0 and 1, as 0.999 does; leave it out for no average")


class WeightAverage:
    """The exponential moving average of a module's trained parameters, starting at what they are now."""

    def __init__(self, module: nn.Module, decay: float):
        """module: the bare one or under DDP or FSDP2. Raises InputError for parameters that cannot be averaged."""
        self._module, self._decay = module, decay
        self._num_updates = 0
        self._is_swapped = False
        self._averages = {name: _averageable(name, local).clone() for name, local in self._locals().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters; call it once behind each update of theirs."""
        assert not self._is_swapped, "the parameters hold the averages now"
        self._num_updates += 1
        # Otherwise the first weights would stay in the average of a short run.
        decay = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
        torch._foreach_lerp_(list(self._averages.values()), list(self._locals().values()), 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the parameters be the averages inside of the block. Every rank enters and leaves it together."""
        assert not self._is_swapped, "the parameters hold the averages already"
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by the parameters' names, and the number of updates; DTensors where parameters are."""
        assert not self._is_swapped, "the averages lie in the parameters now"
        found = {name: _as_parameter(self._averages[name], p) for name, p in self._parameters().items()}
        return {**found, NUM_UPDATES: torch.tensor(self._num_updates)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned, sharded as parameters are now or whole. Raises ValueError by name."""
        parameters = self._parameters()
        if state.keys() != {*parameters, NUM_UPDATES}:
            differing = ", ".join(sorted(state.keys() ^ {*parameters, NUM_UPDATES})[:3])
            raise ValueError(f"the kept averages are of other parameters: {differing}; train what was trained before")
        for name, parameter in parameters.items():
            self._averages[name].copy_(_local(_sharded_as(state[name], parameter)))
        self._num_updates = int(state[NUM_UPDATES])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, local in self._locals().items():  # one parameter's worth of memory at a time
            kept = local.clone()
            local.copy_(self._averages[name])
            self._averages[name].copy_(kept)
        self._is_swapped = not self._is_swapped

    def _parameters(self) -> dict[str, nn.Parameter]:
        # An evaluation may have left FSDP's parameters gathered: those would be read, and not the shards, from then on.
        for module in self._module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return {name: p for name, p in self._module.named_parameters() if p.requires_grad}

    def _locals(self) -> dict[str, Tensor]:
        return {name: _local(parameter) for name, parameter in self._parameters().items()}


class NoAverage:
    """Averages nothing: the parameters stay what they are."""

    def update(self) -> None:
        """Do nothing."""

    def swapped_in(self) -> contextlib.AbstractContextManager[None]:
        """Return a block in which nothing is swapped."""
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raise ValueError where there was an average."""
        if state:
            raise ValueError("the kept state has an average of the weights, and ema.decay is not set; set it as before")


def build_average(module: nn.Module, settings: EmaSettings) -> WeightAverage | NoAverage:
    """Return what the settings ask for."""
    return NoAverage() if settings.decay is None else WeightAverage(module, settings.decay)


def _averageable(name: str, local: Tensor) -> Tensor:
    if local.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{name} is {local.dtype}, too coarse to be averaged; leave ema.decay out, or train float32 weights")
    return local


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part, sharing its memory."""
    tensor = tensor.detach()
    if hasattr(tensor, "ds_id"):
        raise InputError('ema.decay cannot be used with parallel.backend="zero3"; set zero2 or fsdp2')
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_parameter(local: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a copy of a local part as the parameter is: sharded or not."""
    local = local.clone()
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _sharded_as(kept: Tensor, parameter: nn.Parameter) -> Tensor:
    if isinstance(parameter, DTensor) and not isinstance(kept, DTensor):
        return distribute_tensor(kept.to(parameter.device), parameter.device_mesh, parameter.placements)
    return kept
