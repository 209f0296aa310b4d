"""A CPU with as little memory as a test wants: what is beyond it fails as on a GPU, and the peak is known to the byte."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside of it and live; those that were there before count nothing.

    What an operator takes for itself and frees before it ends is not seen. Backwards on a CPU run in the thread that calls them,
    so theirs is.
    """

    def __init__(self, limit: float = float("inf")):
        super().__init__()
        self.limit, self.live, self.peak, self.num_refused = limit, 0, 0, 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {id(each.untyped_storage()) for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)}
        found = func(*args, **(kwargs or {}))
        made = {
            id(storage): storage
            for each in tree_leaves(found)
            if isinstance(each, Tensor) and id(storage := each.untyped_storage()) not in known | self._storages.keys()
        }
        wanted = sum(storage.nbytes() for storage in made.values())
        if self.live + wanted > self.limit:
            self.num_refused += 1
            del found, made, args, kwargs  # an error's traceback keeps this frame, and no allocator keeps what it refuses
            raise torch.OutOfMemoryError(f"CUDA out of memory: {self.live:,} of {self.limit:,} bytes, {wanted:,} wanted.")
        for number, storage in made.items():
            self._storages[number] = weakref.ref(storage, self._freed(number, storage.nbytes()))
            self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        return found

    def _freed(self, number: int, nbytes: int):
        def forget(_: weakref.ref) -> None:
            self.live -= nbytes
            del self._storages[number]

        return forget
