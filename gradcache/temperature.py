"""The temperature that divides the scores, fixed or learnt."""

import math

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """A positive number, held as the logarithm of its inverse.

    When it is learnable, `cached_step` sets its gradient to the true one of the global loss, the same on every rank; it
    must not be part of a module that a parallel backend synchronises.
    Source of the parameter: CLIP (Radford et al. 2021, arXiv 2103.00020).
    """

    def __init__(self, value: float, learnable: bool = False):
        """value: the temperature at the start, more than 0."""
        super().__init__()
        if not value > 0:
            raise ValueError(f"temperature={value} must be more than 0")
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / value)), requires_grad=learnable)

    @property
    def value(self) -> float:
        """The temperature now."""
        return math.exp(-self.log_scale.item())

    def scale(self) -> Tensor:
        """Return the inverse temperature, a scalar with a graph."""
        return self.log_scale.exp()
