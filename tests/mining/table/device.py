"""Where the tables of candidates lie in the tests of this folder; tests/gpu sets a GPU and runs them again."""

import torch

DEVICE = torch.device("cpu")


def on(values):
    """Return what stands in a numpy array or a list as a tensor on the device."""
    return torch.tensor(values, device=DEVICE)
