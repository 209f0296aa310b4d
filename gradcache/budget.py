"""Chunk tokens and kept graphs from measured memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Return the bytes that a forward keeps for its backward: each storage once, parameters and leaves aside."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or not tensor.requires_grad:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # alive until all is counted, or a storage's address could be given out twice
    del kept
    return sum(storages.values())
