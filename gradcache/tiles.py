"""The statistics of rows over columns, and the gradient that their derivative gives both, in tiles of rows over all columns.

Work: one matrix product for the statistics and two for the gradient; where both come in one sweep, or the scores are kept between
them, no product is repeated. Memory: one tile of rows x columns, the kept ones, and some copies of a block of rows, whatever the
batch. The objective sees a block at a time, because on a CPU its passes over a block that stays in the cache cost a tenth of
what they cost over a tile in memory. Nothing here waits for a GPU.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gradcache import fused
from gradcache.blocks import Blocks
from gradcache.free import Device, free_bytes
from gradcache.masks import Masks
from gradcache.matrix import Matrix, TileGradients
from gradcache.objectives.tile import FLOOR, Objective, trained_parameters
from gradcache.passes import ByAutograd, ByKernel, Derivative, InClosedForm, Kept, Pass
from gradcache.products import add_product, for_products, product
from gradcache.tight import is_out_of_memory

# R rows, P columns, D width, S statistics, t rows of one tile

TILE_BYTES = {"cpu": 256 * 2**20, "cuda": 1024 * 2**20}  # scores of one tile, by type of device
FEWEST_ROWS = {"cpu": 1, "cuda": 512}  # of a tile, where memory allows: below, products on a GPU lose speed
SUMMED_ROWS = {"cpu": 1024, "cuda": 16384}  # whose components are multiplied at once, beside the products


class Tiles:
    """One matrix, tile by tile. Scores that `statistics` has kept are used by `gradients`, which destroys them.

    The two may be called on two objects that share `kept`, of the same rows and columns.
    """

    def __init__(
        self,
        matrix: Matrix,
        objective: Objective,
        tile_rows: int | None = None,
        kept: Kept | None = None,
        may_fuse: bool = True,
        compiles: bool | None = None,
    ):
        """tile_rows: rows evaluated at once; None: as many as make TILE_BYTES.

        may_fuse: use the kernels of `gradcache/fused.py` where they run. compiles: let torch.compile fuse the passes of the
        other objectives over a tile; None: on a GPU.
        """
        row_RD, column_PD = for_products(matrix.row_RD), for_products(matrix.column_PD)
        if not len(column_PD):  # one masked column stands in for none, so that an objective needs no special case
            column_PD = row_RD.new_zeros(1, row_RD.shape[1])
            masks = Masks(torch.zeros(1, dtype=torch.int64, device=row_RD.device), [])
            second = matrix.second and (matrix.second[0], matrix.second[1].new_zeros(1, matrix.second[1].shape[1]))
            kind_P = matrix.kind_P.new_zeros(1)
            matrix = replace(matrix, masks=masks, second=second, num_trained_columns=0, kind_P=kind_P)
        self._matrix, self._objective = matrix, objective
        self._row_RD, self._column_PD = row_RD, column_PD
        self._dtype = torch.promote_types(row_RD.dtype, torch.float32)
        self._row_bytes = len(column_PD) * self._dtype.itemsize
        self._tile_rows = min(tile_rows or rows_of_tile(self._row_bytes, row_RD.device), max(1, len(row_RD)))
        self._blocks = Blocks(matrix.masks, self._row_bytes, row_RD.device.type)
        self._kept = Kept() if kept is None else kept
        self._pass = self._choose_pass(objective, may_fuse, compiles)
        self._scratch_tP: Tensor | None = None
        self.num_dropped = torch.zeros((), dtype=torch.int64, device=row_RD.device)  # cells above their row's threshold

    @torch.no_grad()
    def statistics(self, keep_bytes: int = 0) -> tuple[Tensor, int]:
        """Return the statistics of all rows, (R, S), and the bytes of the scores that were kept, at most keep_bytes."""
        kept_bytes, found = 0, []
        for rows in self._tiles():
            size = (rows.stop - rows.start) * self._row_bytes
            keeps = kept_bytes + size <= keep_bytes and self._keep(rows)
            kept_bytes += size if keeps else 0
            score_tP = self._scores(rows, self._kept.scores.get(rows.start))
            found.append(self._pass.statistics(score_tP, rows, keeps))
        return torch.cat(found) if found else self._row_RD.new_zeros(0, num_statistics(self._objective)), kept_bytes

    def gradients(self, derivative: Derivative) -> TileGradients:
        """Return the gradient of rows and columns."""
        matrix, trained = self._matrix, len(self._column_PD)
        if matrix.num_trained_columns is not None:
            trained = matrix.num_trained_columns
        device, width = self._row_RD.device, self._row_RD.shape[1]
        total = TileGradients(
            row_RD=torch.zeros(len(self._row_RD), width, dtype=self._dtype, device=device) if matrix.trains_rows else None,
            column_PD=torch.zeros(trained, width, dtype=self._dtype, device=device) if trained else None,
            scale=torch.zeros((), dtype=torch.float64, device=device),
            positive_R=torch.zeros_like(matrix.positive_R) if self._objective.returns_positive else None,
            parameters=[torch.zeros_like(parameter, dtype=torch.float64) for parameter in trained_parameters(self._objective)],
        )
        for rows in self._tiles():
            is_kept = rows.start in self._kept.scores
            score_tP = self._kept.scores.pop(rows.start) if is_kept else self._scores(rows)
            gradient_tP, has_scale = self._pass.gradient(score_tP, rows, derivative, total, is_kept)
            self._add_products(total, rows, gradient_tP.to(self._row_RD.dtype), has_scale)
        self._scratch_tP = None
        return total

    def _choose_pass(self, objective: Objective, may_fuse: bool, compiles: bool | None) -> Pass:
        row_RD = self._row_RD
        if objective.is_soft_max and may_fuse and fused.can_fuse(row_RD.new_empty(0, 1, dtype=self._dtype)):
            return ByKernel(self._matrix, objective.column_hardness, row_RD.dtype, self._kept)
        # Where rows have no gradient, the scale's needs the scores beside the soft-max.
        if objective.is_soft_max and self._matrix.trains_rows:
            return InClosedForm(self._matrix, objective.column_hardness, self._blocks, self._kept)
        return ByAutograd(self._matrix, objective, self._blocks, row_RD.is_cuda if compiles is None else compiles)

    def _add_products(self, total: TileGradients, rows: slice, gradient_tP: Tensor, has_scale: bool) -> None:
        row_tD = self._row_RD[rows]
        if total.row_RD is not None:
            gradient_tD = product(gradient_tP, self._column_PD, out=total.row_RD[rows])
            if not has_scale:
                # The gradient of the scale is that of the scores times the scores, over the scale; a row's sum of them is
                # its embedding times its gradient. The products of a whole tile would be as large as its rows, in float64 twice.
                most = SUMMED_ROWS.get(row_tD.device.type, SUMMED_ROWS["cuda"])
                for row_bD, gradient_bD in zip(row_tD.split(most), gradient_tD.split(most), strict=True):
                    total.scale += (row_bD * gradient_bD).sum(dtype=torch.float64) / self._matrix.scale
        if total.column_PD is not None:
            add_product(total.column_PD, gradient_tP[:, : len(total.column_PD)].T, row_tD)

    def _scores(self, rows: slice, out_tP: Tensor | None = None) -> Tensor:
        """Return the raw scores of a tile, FLOOR where masked."""
        if out_tP is None:
            if self._scratch_tP is None:
                self._scratch_tP = self._new_tile()
            out_tP = self._scratch_tP[: rows.stop - rows.start]
        product(self._row_RD[rows], self._column_PD.T, out=out_tP)
        threshold_R = self._matrix.threshold_R
        for block, place in self._blocks.of(rows):
            self._blocks.fill(out_tP[place], block, FLOOR)
            if threshold_R is not None:
                is_dropped_bP = out_tP[place] > threshold_R[block, None]
                self.num_dropped += is_dropped_bP.sum()
                out_tP[place].masked_fill_(is_dropped_bP, FLOOR)
        return out_tP

    def _tiles(self) -> Iterator[slice]:
        for start in range(0, len(self._row_RD), self._tile_rows):
            yield slice(start, min(start + self._tile_rows, len(self._row_RD)))

    def _keep(self, rows: slice) -> bool:
        """Take memory that stays for the scores of a tile; return whether there was any."""
        try:
            self._kept.scores[rows.start] = self._new_scores(rows.stop - rows.start)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _new_tile(self) -> Tensor:
        """Return memory for the scores of one tile; raises ValueError, with its size, if there is not enough."""
        try:
            return self._new_scores(self._tile_rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"a tile of tile_rows={self._tile_rows} x {len(self._column_PD)} columns takes "
                f"{self._tile_rows * self._row_bytes / 2**30:.1f} GiB, more than the memory of {self._column_PD.device} has "
                "left; set tile_rows lower"
            ) from error

    def _new_scores(self, num_rows: int) -> Tensor:
        return self._column_PD.new_empty(num_rows, len(self._column_PD), dtype=self._dtype)


def rows_of_tile(row_bytes: int, device: Device) -> int:
    """Return how many rows of scores are evaluated at once."""
    rows = max(1, TILE_BYTES.get(device.type, TILE_BYTES["cuda"]) // row_bytes)
    fewest = FEWEST_ROWS.get(device.type, FEWEST_ROWS["cuda"])
    if device.type == "cuda" and rows < fewest:
        rows = max(rows, min(fewest, free_bytes(device) // 4 // row_bytes))
    return rows


def num_statistics(objective: Objective) -> int:
    """Return S."""
    return sum(merge.width for merge in objective.merges)
