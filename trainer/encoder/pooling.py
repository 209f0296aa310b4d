"""One vector from the token states of a text, whether its chunk is padded, (n, L, D), or packed, (T, D).

Where a model leaves prompts out, the pooled tokens are those behind them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.encoder.rows import Rows, wide

# n rows, L tokens of the longest row, T tokens of all rows, D width


def mean(states: Tensor, rows: Rows) -> Tensor:
    """Return the mean state of the pooled tokens."""
    return _total(states, rows, power=1.0)


def mean_sqrt(states: Tensor, rows: Rows) -> Tensor:
    """Return the sum of the pooled tokens' states over the square root of their number."""
    return _total(states, rows, power=0.5)


def weighted_mean(states: Tensor, rows: Rows) -> Tensor:
    """Return the mean state with the first real token weighted 1, the second 2, and so on.

    Source: SGPT, arXiv 2202.08904; later tokens of a causal model have seen more of the text.
    """
    numbers = rows.numbers(states)
    weight = (numbers if rows.pooled is None else numbers * rows.pooled).unsqueeze(-1).to(wide(states))
    return (rows.total(states * weight) / rows.total(weight).clamp(min=1e-9)).to(states.dtype)


def largest(states: Tensor, rows: Rows) -> Tensor:
    """Return the largest value of each number among the pooled tokens' states."""
    return rows.largest(states if rows.pooled is None else states.masked_fill(rows.pooled.unsqueeze(-1) == 0, -torch.inf))


def cls(states: Tensor, rows: Rows) -> Tensor:
    """Return the state of the first pooled token."""
    return rows.first(states)


def last(states: Tensor, rows: Rows) -> Tensor:
    """Return the state of the last pooled token. Source: cpt-text, arXiv 2201.10005."""
    return rows.last(states)


Pooling = Callable[..., Tensor]  # (states, rows)
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
    return lambda states, rows: torch.cat([part(states, rows) for part in parts], -1)  # type: ignore[misc]


def num_poolings(name: str) -> int:
    """Return how many times the width of a state an embedding has."""
    return name.count("+") + 1


def _total(states: Tensor, rows: Rows, power: float) -> Tensor:
    if rows.pooled is None:
        weight = states.new_ones(()).expand(*states.shape[:-1], 1)
        total_nD = rows.total(states)
    else:
        weight = rows.pooled.unsqueeze(-1).to(states.dtype)
        total_nD = rows.total(states * weight)
    return (total_nD / rows.total(weight).clamp(min=1).pow(power)).to(states.dtype)
