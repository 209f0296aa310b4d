"""One vector from the token states of a text."""

from collections.abc import Callable

import torch
from torch import Tensor

# n rows, L tokens, D width


def mean(states_nLD: Tensor, mask_nL: Tensor) -> Tensor:
    """Return the mean state of the real tokens."""
    weight_nL1 = mask_nL.unsqueeze(-1).to(states_nLD.dtype)
    total_nD = (states_nLD * weight_nL1).sum(1, dtype=_wide(states_nLD))
    return (total_nD / weight_nL1.sum(1, dtype=_wide(states_nLD)).clamp(min=1)).to(states_nLD.dtype)


def weighted_mean(states_nLD: Tensor, mask_nL: Tensor) -> Tensor:
    """Return the mean state with the first real token weighted 1, the second 2, and so on.

    Source: SGPT, arXiv 2202.08904; later tokens of a causal model have seen more of the text.
    """
    weight_nL1 = (mask_nL.cumsum(1) * mask_nL).unsqueeze(-1).to(_wide(states_nLD))
    total_nD = (states_nLD * weight_nL1).sum(1)
    return (total_nD / weight_nL1.sum(1).clamp(min=1e-9)).to(states_nLD.dtype)


def cls(states_nLD: Tensor, mask_nL: Tensor) -> Tensor:
    """Return the state of the first real token, whichever side is padded."""
    return _at(states_nLD, mask_nL.int().argmax(1))


def last(states_nLD: Tensor, mask_nL: Tensor) -> Tensor:
    """Return the state of the last real token, whichever side is padded. Source: cpt-text, arXiv 2201.10005."""
    return _at(states_nLD, mask_nL.shape[1] - 1 - mask_nL.flip(1).int().argmax(1))


def _wide(states_nLD: Tensor) -> torch.dtype:
    """Return what sums over tokens are made in."""
    return torch.promote_types(states_nLD.dtype, torch.float32)


def _at(states_nLD: Tensor, position_n: Tensor) -> Tensor:
    return states_nLD[torch.arange(len(states_nLD), device=states_nLD.device), position_n]


# name in job files -> function; `latent` has weights of its own (latent.py)
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": mean,
    "cls": cls,
    "last": last,
    "weighted_mean": weighted_mean,
}
