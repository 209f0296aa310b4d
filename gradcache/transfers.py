"""What goes between the host and a device: up without a wait, and down in one wait for all that is needed at a time.

A host that waits for a GPU has nothing queued for it when it goes on, so the GPU idles; therefore a step's waits are few, and
their number does not depend on its chunks and tiles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Return values of the host on a device; neither side waits for the other."""
    if device.type == "cuda" and values.device.type == "cpu" and values.numel():
        # From memory that is not pinned, a copy would wait until the device has done all that is queued.
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def read_together(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return some tensors of one axis and type on the host. Waits for the device, once."""
    return torch.cat(list(parts)).cpu().split([len(part) for part in parts]) if parts else []


class Arriving:
    """Numbers that are on their way to the host; who reads them waits only until they are there."""

    def __init__(self, values: Tensor):
        """values: of one axis; later changes to them are not seen."""
        # Off a GPU this copy goes to pinned memory, and nobody waits for it here.
        self._values = values.detach().to("cpu", non_blocking=True, copy=True)
        self._arrival = None
        if values.is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """Return the numbers."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._values.tolist()
