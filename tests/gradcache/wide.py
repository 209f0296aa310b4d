"""An encoder whose graph is all of a step's memory, so that a limit of memory is a limit of rows."""

import torch
from torch import Tensor, nn

from gradcache import Batch, Tower

HIDDEN = 2**17  # on a GPU: 1 MiB a row while it is encoded; a CPU does with less


class Wide(nn.Module):
    """Two layers with so many hidden numbers a row: a graph keeps one copy of them, a forward makes two, a backward three."""

    def __init__(self, hidden: int = HIDDEN):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, hidden), nn.Tanh(), nn.Linear(hidden, 8))

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.normalize(self.layers(rows))


def wide_batch(encode, num_pairs: int = 512, device: str = "cpu", seed: int = 1) -> Batch:
    """Return pairs of one token a row; another seed: other rows."""
    rows = torch.randn(2 * num_pairs, 16, generator=torch.Generator().manual_seed(seed))
    ones, keys = torch.ones(2 * num_pairs, dtype=torch.int64), torch.arange(2 * num_pairs) + 2 * num_pairs * seed
    tower = Tower(encode=encode, lengths=ones, load=lambda chosen: rows[chosen].to(device))
    return Batch(
        towers=[tower], num_queries=num_pairs, keys=keys, target=torch.arange(num_pairs), positive_keys=keys[num_pairs:, None]
    )
