"""`Sizes`: how large the tensors are that a block of code creates, by watching what torch returns from each operation."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Sizes(TorchDispatchMode):
    """The numbers of elements of the tensors that operations have returned; a view counts with the memory it looks at."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.total = 0
        self.of_largest: tuple[int, ...] = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.total += tensor.numel()
                if held > self.largest:
                    self.largest, self.of_largest = held, tuple(tensor.shape)
        return result
