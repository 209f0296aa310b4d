"""`Sizes`: how large the tensors are that a block of code creates, by watching what torch returns from each operation."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Sizes(TorchDispatchMode):
    """The memory of the tensors that operations have returned; a view counts with all that it looks at."""

    def __init__(self):
        super().__init__()
        self.largest_bytes = 0
        self.of_largest: tuple[int, ...] = ()
        self.num_values = 0  # of all tensors together, a measure of the work

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.num_values += tensor.numel()
                if tensor.untyped_storage().nbytes() > self.largest_bytes:
                    self.largest_bytes, self.of_largest = tensor.untyped_storage().nbytes(), tuple(tensor.shape)
        return result
