"""A whole draw on a pretended GPU: no table of the host meets one of the GPU, and the negatives are those of a CPU."""

import numpy as np
import pytest
import torch

from tests.mining.table import device
from tests.mining.table.test_rules import any_settings, draw
from tests.pretended import DEVICE, OnDevice, Waits


class PretendedGpu(Waits):
    """Also says that its tensors are CUDA's, so that a GPU's way is taken."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return isinstance(args[0], OnDevice)
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("seed", [0, 1, 2, 4, 5, 6, 10, 11])  # every method, with and without a cross-encoder
def test_a_draw_stays_on_its_device(seed, monkeypatch):
    expected = draw(any_settings(seed))
    monkeypatch.setattr(device, "DEVICE", DEVICE)
    with PretendedGpu() as gpu:
        found = draw(any_settings(seed))
    assert gpu.num_others > 100
    assert (found.counts, found.dropped) == (expected.counts, expected.dropped)
    for name in ("indptr", "ids", "scores"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
