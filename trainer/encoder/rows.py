"""The rows of a chunk, padded or packed: what a pooling asks of either kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# n rows, L tokens of the longest row, T tokens of all rows, x whatever follows


class Rows(Protocol):
    """Values of tokens, (n, L, x) or (T, x), belong to n texts."""

    @property
    def pooled(self) -> Tensor | None:
        """Mask of the tokens that are pooled, (n, L) or (T,); None: of all."""

    def total(self, values: Tensor) -> Tensor:
        """Return the (n, x) sums, at least in float32, over all tokens, padding included."""

    def largest(self, values: Tensor) -> Tensor:
        """Return the (n, x) largest values, padding included."""

    def numbers(self, like: Tensor) -> Tensor:
        """Return the number of each real token within its text, from 1, (n, L) or (T,)."""

    def first(self, values: Tensor) -> Tensor:
        """Return the (n, x) values of the first pooled token of each text."""

    def last(self, values: Tensor) -> Tensor:
        """Return the (n, x) values of the last pooled token of each text."""


@dataclass(frozen=True)
class Padded:
    """Every row has L tokens, some of them padding on either side."""

    pooled: Tensor | None  # (n, L)
    real: Tensor | None  # (n, L), not 0 where a token is no padding; None: nowhere is any

    def places(self) -> Tensor | None:
        """Return the (n, L) int64 number of each real token within its text, from 0; None where it is that of its column."""
        return None if self.real is None else (self.real.cumsum(1) - 1).clamp(min=0)

    def total(self, values: Tensor) -> Tensor:
        """Return the (n, x) sums."""
        return values.sum(1, dtype=wide(values))

    def largest(self, values: Tensor) -> Tensor:
        """Return the (n, x) largest values."""
        return values.amax(1)

    def numbers(self, like: Tensor) -> Tensor:
        """Return the (n, L) number of each real token within its text."""
        if self.real is not None:
            return self.real.cumsum(1)
        return torch.arange(1, like.shape[1] + 1, device=like.device).expand(len(like), -1)

    def first(self, values: Tensor) -> Tensor:
        """Return the (n, x) values of the first pooled token, whichever side is padded."""
        return values[:, 0] if self.pooled is None else _at(values, self.pooled.int().argmax(1))

    def last(self, values: Tensor) -> Tensor:
        """Return the (n, x) values of the last pooled token, whichever side is padded."""
        if self.pooled is None:
            return values[:, -1]
        return _at(values, self.pooled.shape[1] - 1 - self.pooled.flip(1).int().argmax(1))


@dataclass(frozen=True)
class Packed:
    """Rows stand one behind the other; what is pooled of one reaches to its end. Nothing here waits for a device."""

    starts: Tensor  # (n + 1,) int32; the last is T
    longest: int  # tokens of the longest row, or more
    pooled: Tensor | None  # (T,)

    def places(self, num_tokens: int) -> Tensor:
        """Return the (T,) int64 number of each token within its text, from 0."""
        start_T = self.starts[:-1].repeat_interleave(self.starts.diff(), output_size=num_tokens)
        return torch.arange(num_tokens, device=self.starts.device) - start_T

    def total(self, values: Tensor) -> Tensor:
        """Return the (n, x) sums, each in the order of its tokens, so that they are the same every time."""
        return torch.segment_reduce(values.to(wide(values)), "sum", offsets=self.starts, unsafe=True)

    def largest(self, values: Tensor) -> Tensor:
        """Return the (n, x) largest values."""
        return torch.segment_reduce(values, "max", offsets=self.starts, unsafe=True)

    def numbers(self, like: Tensor) -> Tensor:
        """Return the (T,) number of each token within its text."""
        return self.places(len(like)) + 1

    def first(self, values: Tensor) -> Tensor:
        """Return the (n, x) values of the first pooled token."""
        if self.pooled is None:
            return values[self.starts[:-1]]
        num_pooled_n = self.total(self.pooled.float().unsqueeze(-1)).squeeze(-1).to(self.starts.dtype)
        return values[self.starts[1:] - num_pooled_n.clamp(min=1)]

    def last(self, values: Tensor) -> Tensor:
        """Return the (n, x) values of the last token."""
        return values[self.starts[1:] - 1]


def rows_of(inputs: Mapping[str, Any]) -> Padded | Packed:
    """Return the rows of an encoder's inputs."""
    pooled = inputs.get("pooled_mask")
    if "starts" in inputs:
        return Packed(inputs["starts"], inputs["longest"], pooled)
    real = inputs.get("attention_mask")
    return Padded(real if pooled is None else pooled, real)


def wide(values: Tensor) -> torch.dtype:
    """Return what sums over tokens are made in."""
    return torch.promote_types(values.dtype, torch.float32)


def _at(values: Tensor, place_n: Tensor) -> Tensor:
    return values[torch.arange(len(values), device=values.device), place_n]
