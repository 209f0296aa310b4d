"""The loss stage of a rank: embeddings that stand there already, their loss and gradients, and the products it cannot do without.

The bare products run in the same tiles, because the whole matrix of scores would not fit: it is what nobody should hold. They are
three: scores, the rows' gradient, the columns' gradient.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache import Batch, InfoNCE, LossOptions, Objective, Temperature, Tower
from gradcache.agree import Agreed
from gradcache.exchange import Counts
from gradcache.loss import global_loss
from gradcache.products import for_products, product
from gradcache.tiles import rows_of_tile
from gradcache.way import Way

SCALE = 20.0


@dataclass(frozen=True)
class Stage:
    """Rows and columns of this rank, all texts distinct, and what the ranks have agreed on."""

    batch: Batch
    agreed: Agreed
    group: dist.ProcessGroup | None

    def loss(self, objective: Objective | None = None, **options) -> Way:
        """Compute the loss and its gradients; return what travelled. Collective."""
        device = self.agreed.embedding_nD.device
        loss = LossOptions(objective=objective or InfoNCE(), **options)
        temperature = Temperature(1 / SCALE).to(device)
        return global_loss(self.batch, self.agreed, options=loss, temperature=temperature, group=self.group).way


def make_stage(
    rows: int, columns: int, width: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup | None = None
) -> Stage:
    """Return a stage of so many queries and passages of this rank; every rank has as many. Does not communicate."""
    num_ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    num_rows = rows + columns
    keys = rank * num_rows + torch.arange(num_rows)
    tower = Tower(encode=lambda rows: rows, lengths=torch.ones_like(keys), load=lambda rows: rows)
    target = torch.arange(rows)
    batch = Batch(towers=[tower], num_queries=rows, keys=keys, target=target, positive_keys=keys[rows:][target][:, None])
    of_ranks, none = [rows] * num_ranks, [0] * num_ranks
    counts = Counts(queries=of_ranks, passages=[columns] * num_ranks, extra=none, positives=of_ranks, hidden=none)
    embedding_nD = unit_rows(num_rows, width, device, dtype, seed=rank)
    return Stage(batch, Agreed(embedding_nD, counts, [num_rows] * num_ranks, 0, None), group)


def unit_rows(num_rows: int, width: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """Return random embeddings, (num_rows, width), of unit length."""
    torch.manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(num_rows, width, device=device), dim=1).to(dtype)


class BareProducts:
    """The three products of rows and columns. All their memory is there before they run."""

    def __init__(self, row_BD: Tensor, column_PD: Tensor):
        self.row_BD, self.column_PD = for_products(row_BD), for_products(column_PD)
        wide = torch.promote_types(self.row_BD.dtype, torch.float32)
        tile_rows = rows_of_tile(len(column_PD) * wide.itemsize, row_BD.device)
        self.score_tP = self.row_BD.new_empty(min(tile_rows, len(row_BD)), len(column_PD), dtype=wide)
        # What stands for the scores' gradient is multiplied in the type of the embeddings.
        self.gradient_tP = self.score_tP
        if wide != self.row_BD.dtype:
            self.gradient_tP = torch.randn_like(self.score_tP, dtype=self.row_BD.dtype)
        self.row_gradient_BD = torch.empty_like(self.row_BD, dtype=wide)
        self.column_gradient_PD = torch.empty_like(self.column_PD, dtype=wide)

    def run(self) -> None:
        """Multiply, tile by tile."""
        tile_rows = len(self.score_tP)
        for start in range(0, len(self.row_BD), tile_rows):
            part_tD = self.row_BD[start : start + tile_rows]
            gradient_tP = self.gradient_tP[: len(part_tD)]
            product(part_tD, self.column_PD.T, out=self.score_tP[: len(part_tD)])
            product(gradient_tP, self.column_PD, out=self.row_gradient_BD[start : start + tile_rows])
            product(gradient_tP.T, part_tD, out=self.column_gradient_PD)
