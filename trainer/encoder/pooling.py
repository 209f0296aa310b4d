"""One vector from the token states of a text.

Where a model leaves prompts out, `mask_nL` is of the tokens behind them, and `real_nL` of the whole text.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# n rows, L tokens, D width


def mean(states_nLD: Tensor, mask_nL: Tensor, real_nL: Tensor | None = None) -> Tensor:
    """Return the mean state of the real tokens."""
    return _total(states_nLD, mask_nL, power=1.0)


def mean_sqrt(states_nLD: Tensor, mask_nL: Tensor, real_nL: Tensor | None = None) -> Tensor:
    """Return the sum of the real tokens' states over the square root of their number."""
    return _total(states_nLD, mask_nL, power=0.5)


def weighted_mean(states_nLD: Tensor, mask_nL: Tensor, real_nL: Tensor | None = None) -> Tensor:
    """Return the mean state with the first real token weighted 1, the second 2, and so on.

    Source: SGPT, arXiv 2202.08904; later tokens of a causal model have seen more of the text.
    """
    real_nL = mask_nL if real_nL is None else real_nL
    weight_nL1 = (real_nL.cumsum(1) * mask_nL).unsqueeze(-1).to(_wide(states_nLD))
    total_nD = (states_nLD * weight_nL1).sum(1)
    return (total_nD / weight_nL1.sum(1).clamp(min=1e-9)).to(states_nLD.dtype)


def largest(states_nLD: Tensor, mask_nL: Tensor, real_nL: Tensor | None = None) -> Tensor:
    """Return the largest value of each number among the real tokens' states."""
    return states_nLD.masked_fill(mask_nL.unsqueeze(-1) == 0, -torch.inf).amax(1)


def cls(states_nLD: Tensor, mask_nL: Tensor, real_nL: Tensor | None = None) -> Tensor:
    """Return the state of the first real token, whichever side is padded."""
    return _at(states_nLD, mask_nL.int().argmax(1))


def last(states_nLD: Tensor, mask_nL: Tensor, real_nL: Tensor | None = None) -> Tensor:
    """Return the state of the last real token, whichever side is padded. Source: cpt-text, arXiv 2201.10005."""
    return _at(states_nLD, mask_nL.shape[1] - 1 - mask_nL.flip(1).int().argmax(1))


Pooling = Callable[..., Tensor]  # (states, mask, real tokens)
# name in job files -> function; `latent` has weights of its own (latent.py)
POOLINGS: dict[str, Pooling] = {
    "mean": mean,
    "cls": cls,
    "last": last,
    "weighted_mean": weighted_mean,
    "max": largest,
    "mean_sqrt": mean_sqrt,
}
# our name -> sentence-transformers', and what its older folders call a flag of it; several are joined in this order there
MODES = {
    "cls": ("cls", "cls_token"),
    "max": ("max", "max_tokens"),
    "mean": ("mean", "mean_tokens"),
    "mean_sqrt": ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
    "weighted_mean": ("weightedmean", "weightedmean_tokens"),
    "last": ("lasttoken", "lasttoken"),
}


def pooling_of(name: str) -> Pooling | None:
    """Return a pooling, of names with "+" between them the vectors one behind the other; None for an unknown name."""
    parts = [POOLINGS.get(part) for part in name.split("+")]
    if None in parts:
        return None
    if len(parts) == 1:
        return parts[0]
    return lambda states_nLD, mask_nL, real_nL: torch.cat([part(states_nLD, mask_nL, real_nL) for part in parts], -1)  # type: ignore[misc]


def num_poolings(name: str) -> int:
    """Return how many times the width of a state an embedding has."""
    return name.count("+") + 1


def _total(states_nLD: Tensor, mask_nL: Tensor, power: float) -> Tensor:
    weight_nL1 = mask_nL.unsqueeze(-1).to(states_nLD.dtype)
    total_nD = (states_nLD * weight_nL1).sum(1, dtype=_wide(states_nLD))
    return (total_nD / weight_nL1.sum(1, dtype=_wide(states_nLD)).clamp(min=1).pow(power)).to(states_nLD.dtype)


def _wide(states_nLD: Tensor) -> torch.dtype:
    """Return what sums over tokens are made in."""
    return torch.promote_types(states_nLD.dtype, torch.float32)


def _at(states_nLD: Tensor, position_n: Tensor) -> Tensor:
    return states_nLD[torch.arange(len(states_nLD), device=states_nLD.device), position_n]
