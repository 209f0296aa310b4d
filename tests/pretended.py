"""A GPU that is pretended on the CPU: what is said to lie on it tells where the host would wait for it.

On it lies what was brought there by `to(device)` or made with `device=`, what a test puts there, and all that comes of these.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[1]
# Methods and functions that return what the host has to know: a value, or a size that follows from values.
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__", "numpy", "cpu"}
READS |= {"nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "bincount", "equal", "allclose", "is_nonzero"}
# Those that make a tensor from values of the host; with a device they copy, and wait.
FROM_HOST = {"tensor", "as_tensor", "asarray", "from_numpy"}


HOST, DEVICE = torch.device("cpu"), torch.device("cpu", 0)  # which torch takes for the same, and we do not


class OnDevice(Tensor):
    """Values on the pretended GPU."""


def on_device(values: Tensor) -> Tensor:
    """Return the same values on the pretended GPU."""
    return values.as_subclass(OnDevice)


def put_on_device(module: torch.nn.Module) -> torch.nn.Module:
    """Move a module's own parameters to the pretended GPU, and return it."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        moved = torch.nn.Parameter(on_device(parameter.detach()), parameter.requires_grad)
        setattr(module, name, moved)
    return module


class Waits(TorchFunctionMode):
    """Counts where the host would wait for the pretended GPU, and all other calls.

    Raises AssertionError where a tensor of the host meets one of the GPU, which a real one refuses or copies with a wait.
    every: all tensors lie on the GPU, but for those that torch's optimizers keep on the host.
    """

    def __init__(self, every: bool = False):
        super().__init__()
        self.places: Counter[str] = Counter()  # "file.function" of this project
        self.num_others = 0
        self._every = every

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE if isinstance(args[0], OnDevice) else HOST
        tensors = [value for value in _flat([*args, *kwargs.values()]) if isinstance(value, Tensor)]
        there = [value for value in tensors if self._every or isinstance(value, OnDevice)]
        moves = name == "to" or name in FROM_HOST
        if _is_read(name, args, kwargs, there) or (moves and self._is_waiting_copy(name, args, kwargs)):
            self._note()
        else:
            self.num_others += 1
        host = [value for value in tensors if not isinstance(value, OnDevice) and value.ndim]
        if there and host and not self._every and not moves and name != "__get__":
            raise AssertionError(f"{name} in {_place()} mixes tensors of the host, {host[0].shape}, and of the GPU")
        is_to_device = any(v is DEVICE for v in [*args, *kwargs.values()]) or (moves and _is_to_other(args))
        leaves = name == "cpu" or (moves and bool(there) and _leaves(args, kwargs))
        args, kwargs = [HOST if a is DEVICE else a for a in args], {k: HOST if v is DEVICE else v for k, v in kwargs.items()}
        found = func(*args, **kwargs)
        if leaves:
            return found.as_subclass(Tensor)
        return on_device(found) if is_to_device and isinstance(found, Tensor) and not isinstance(found, OnDevice) else found

    def _is_waiting_copy(self, name: str, args, kwargs) -> bool:
        """Tell whether a call copies from one side to the other, and waits for that."""
        if kwargs.get("non_blocking"):
            return False
        if name in FROM_HOST:
            return kwargs.get("device") is DEVICE
        if isinstance(args[0], OnDevice):
            return _leaves(args, kwargs)
        return any(value is DEVICE for value in [*args, *kwargs.values()]) or _is_to_other(args)

    def _note(self) -> None:
        frame = sys._getframe(2)
        if self._every and "torch/optim" in frame.f_code.co_filename:
            return
        self.places[_place()] += 1


def _is_read(name: str, args, kwargs, there: list[Tensor]) -> bool:
    if not there:
        return False
    if name in ("__getitem__", "__setitem__"):
        return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in _flat([args[1]]))
    if name == "repeat_interleave":
        return any(isinstance(value, Tensor) for value in args[1:]) and kwargs.get("output_size") is None
    return name in READS or (name == "where" and len(args) == 1)


def _is_to_other(args) -> bool:
    """Tell whether a tensor of the host is to go where another one is, on the pretended GPU."""
    return len(args) > 1 and not isinstance(args[0], OnDevice) and isinstance(args[1], OnDevice)


def _leaves(args, kwargs) -> bool:
    """Tell whether a call names the host."""
    return any(value is HOST or (isinstance(value, str) and value == "cpu") for value in [*args, *kwargs.values()])


def _flat(values) -> list:
    found = []
    for value in values:
        found += _flat(value) if isinstance(value, list | tuple) else [value]
    return found


def _place() -> str:
    """Return the file and the function of this project that is at work, but for those that only carry values."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        is_ours = path.is_relative_to(ROOT) and path.parent.name in ("gradcache", "trainer", "objectives")
        if is_ours and path.stem not in ("transfers", "exchange"):
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
