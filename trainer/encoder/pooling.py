"""One vector from the token states of a text."""

from collections.abc import Callable

from torch import Tensor

# n rows, L tokens, D width


def mean(states_nLD: Tensor, mask_nL: Tensor) -> Tensor:
    """Return the mean state of the real tokens."""
    weight_nL1 = mask_nL.unsqueeze(-1).to(states_nLD.dtype)
    return (states_nLD * weight_nL1).sum(1) / weight_nL1.sum(1).clamp(min=1)


def cls(states_nLD: Tensor, mask_nL: Tensor) -> Tensor:
    """Return the state of the first real token, whichever side is padded."""
    return _at(states_nLD, mask_nL.int().argmax(1))


def last(states_nLD: Tensor, mask_nL: Tensor) -> Tensor:
    """Return the state of the last real token, whichever side is padded. Source: cpt-text, arXiv 2201.10005."""
    return _at(states_nLD, mask_nL.shape[1] - 1 - mask_nL.flip(1).int().argmax(1))


def _at(states_nLD: Tensor, position_n: Tensor) -> Tensor:
    return states_nLD[range(len(states_nLD)), position_n]


# name in job files -> function, and the name that sentence-transformers uses for it
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean, "cls": cls, "last": last}
SENTENCE_TRANSFORMERS_NAMES = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
