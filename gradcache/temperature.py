"""The temperature that divides the scores, fixed or learnt."""

import math

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """A positive number, held as the logarithm of its inverse.

    When it is learnable, `cached_step` sets its gradient to the true one of the global loss, the same on every rank; it
    must not be part of a module that a parallel backend synchronises. Call `bound` behind each update of the optimizer:
    without it the temperature falls without end where pairs are easily told apart, until scores overflow.
    Source of the parameter and its bound: CLIP (Radford et al. 2021, arXiv 2103.00020).
    """

    def __init__(self, value: float, learnable: bool = False, minimum: float = 0.01):
        """value: the temperature at the start, more than 0. minimum: of a learnable one; CLIP's by default."""
        super().__init__()
        if not value > 0:
            raise ValueError(f"temperature={value} must be more than 0")
        if not 0 < minimum <= (value if learnable else math.inf):
            raise ValueError(f"minimum={minimum} of a learnable temperature must be more than 0 and at most its start {value}")
        self._most_log_scale = math.log(1 / minimum)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / value)), requires_grad=learnable)

    @property
    def value(self) -> float:
        """The temperature now; reading it waits for a GPU."""
        return math.exp(-self.log_scale.item())

    @torch.no_grad()
    def bound(self) -> Tensor:
        """Raise a learnable temperature that an update took below its minimum; return whether it sits there, a scalar bool.

        The answer stays on the device until it is asked for.
        """
        if self.log_scale.requires_grad:
            self.log_scale.clamp_(max=self._most_log_scale)
        return self.is_at_bound()

    @torch.no_grad()
    def is_at_bound(self) -> Tensor:
        """Return whether it is learnt and sits at its minimum, a scalar bool on the device."""
        return (self.log_scale >= self._most_log_scale) & self.log_scale.requires_grad

    def scale(self) -> Tensor:
        """Return the inverse temperature, a scalar with a graph."""
        return self.log_scale.exp()
