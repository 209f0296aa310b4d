"""A score and an id as one integer, whose order is (score ascending, id descending): the largest keys are the best passages."""

import torch
from torch import Tensor

NOTHING = -(1 << 63)  # key of an empty place, below that of any score
ID_BITS = 32
LARGEST_ID = (1 << ID_BITS) - 1


def pack_keys(scores: Tensor, ids: Tensor) -> Tensor:
    """Return int64 keys; NOTHING for ids of -1 and for scores that are not numbers."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: minus zero is zero
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)  # as signed integers, in the order of the numbers
    return torch.where((ids < 0) | scores.isnan(), NOTHING, (ordered << ID_BITS) | (LARGEST_ID - ids))


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (scores float32, ids int64) of keys; (-inf, -1) for NOTHING."""
    ordered = (keys >> ID_BITS).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    is_there = keys != NOTHING
    return torch.where(is_there, scores, -torch.inf), torch.where(is_there, LARGEST_ID - (keys & LARGEST_ID), -1)
