"""What the ranks hand to each other in some work, call by call, whoever calls: a loss, DDP, FSDP2 or DeepSpeed."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache.traffic import Collective, Message, sent_bytes

# How torch's own operators are called -> the collective. What else there is moves no data between all ranks of a step.
KINDS: dict[str, Collective] = {
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "alltoall": "all_to_all",
}


class Moved(TorchDispatchMode):
    """Notes the collectives called inside; a rank that gets more than it sends counts what it gets."""

    def __init__(self, num_ranks: int):
        """Start with none."""
        super().__init__()
        self.messages: list[Message] = []
        self._num_ranks = num_ranks

    @property
    def num_bytes(self) -> int:
        """What this rank sends of all of them."""
        return int(sum(sent_bytes(message, self._num_ranks) for message in self.messages))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a collective, and call everything."""
        if function.namespace == "c10d":
            name = str(function).removeprefix("c10d.").lstrip("_")
            kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), None)
            if kind is not None:
                self.messages.append(Message(kind, "", max(map(_num_bytes, args[:2]))))
        return function(*args, **(kwargs or {}))


def _num_bytes(side: Any) -> int:
    if isinstance(side, torch.Tensor):
        return side.nbytes
    return sum(map(_num_bytes, side)) if isinstance(side, list | tuple) else 0
