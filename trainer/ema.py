"""A moving average of the trained weights, for evaluation and for what is published.

It holds one more copy of what this rank holds of the trained weights. While averages are swapped in they lie in the
parameters themselves, so whatever encodes, saves or hashes the model sees them; swapping moves bits and changes none.
Source: Polyak & Juditsky 1992; the slower start is TensorFlow's ExponentialMovingAverage with num_updates.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.errors import InputError
from trainer.job import EmaSettings
from trainer.parallel import Parallel
from trainer.parts import Fragment


class WeightAverage:
    """The exponential moving average of a model's trained weights, starting at what they are now."""

    def __init__(self, parallel: Parallel, decay: float):
        """Raise InputError for weights that cannot be averaged."""
        self._parallel, self._decay = parallel, decay
        self.num_updates = 0
        self._is_swapped = False
        self._averages = {name: _averageable(name, local).clone() for name, local in self._locals().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights; call it once behind each update of theirs."""
        assert not self._is_swapped, "the parameters hold the averages now"
        self.num_updates += 1
        # Otherwise the first weights would stay in the average of a short run.
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
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

    def fragments(self) -> Iterator[Fragment]:
        """Yield what this rank holds, as views: what is copied into them takes effect."""
        assert not self._is_swapped, "the averages lie in the parameters now"
        for name, parameter in self._parallel.trained().items():
            place = self._parallel.fragment(f"average.{name}", parameter.detach())
            yield replace(place, values=self._averages[name].view(-1))

    @torch.no_grad()
    def _swap(self) -> None:
        for name, local in self._locals().items():  # one parameter's worth of memory at a time
            kept = local.clone()
            local.copy_(self._averages[name])
            self._averages[name].copy_(kept)
        self._is_swapped = not self._is_swapped

    def _locals(self) -> dict[str, Tensor]:
        return {name: _local(parameter) for name, parameter in self._parallel.trained().items()}


class NoAverage:
    """Averages nothing: the weights stay what they are."""

    num_updates = 0

    def update(self) -> None:
        """Do nothing."""

    def swapped_in(self) -> contextlib.AbstractContextManager[None]:
        """Return a block in which nothing is swapped."""
        return contextlib.nullcontext()

    def fragments(self) -> Iterator[Fragment]:
        """Yield nothing."""
        yield from ()


def build_average(parallel: Parallel, settings: EmaSettings) -> WeightAverage | NoAverage:
    """Return what the settings ask for."""
    return NoAverage() if settings.decay is None else WeightAverage(parallel, settings.decay)


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
