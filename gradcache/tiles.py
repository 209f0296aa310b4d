"""The statistics of rows over columns, and the gradient that their derivative gives both, in tiles of rows over all columns.

Work: one matrix product for the statistics and two for the gradient; where both come in one sweep, or the scores are kept between
them, no product is repeated. Memory: one tile of rows x columns, the kept ones, and some copies of a block of rows, whatever the
batch. The objective sees a block at a time, because on a CPU its passes over a block that stays in the cache cost a tenth of
what they cost over a tile in memory. Nothing here waits for a GPU.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gradcache import fused
from gradcache.compiled import compiled_statistics
from gradcache.masks import Masks
from gradcache.matrix import Matrix, TileGradients
from gradcache.objectives.tile import FLOOR, Objective, Tile, trained_parameters
from gradcache.products import add_product, for_products, product
from gradcache.soft_max import Largest, put_gradient, take_soft_max

# R rows, P columns, D width, S statistics, t rows of one tile, b rows of one block

TILE_BYTES = {"cpu": 256 * 2**20, "cuda": 1024 * 2**20}  # scores of one tile, by type of device
BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}  # scores of one block: 4 MiB stay in a core's share of the cache
BLOCK_CELLS = 4 * 2**20  # masked cells of one block, which stand in a list of 16 bytes each
FEWEST_ROWS = {"cpu": 1, "cuda": 512}  # of a tile, where memory allows: below, products on a GPU lose speed

Derivative = Callable[[slice, Tensor], Tensor]  # of the loss of some rows, from their statistics (b, S) to these, (b, S)


class Tiles:
    """One matrix, tile by tile. Scores that `statistics` has kept are used by `gradients`, which destroys them."""

    def __init__(
        self,
        matrix: Matrix,
        objective: Objective,
        tile_rows: int | None = None,
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
        self._kind = row_RD.device.type
        self._row_bytes = len(column_PD) * self._dtype.itemsize
        self._tile_rows = min(tile_rows or rows_of_tile(self._row_bytes, row_RD.device), max(1, len(row_RD)))
        self._compiles = self._kind == "cuda" if compiles is None else compiles
        self._fuses = may_fuse and objective.is_soft_max and fused.can_fuse(row_RD.new_empty(0, 1, dtype=self._dtype))
        # Where rows have no gradient, the scale's needs the scores beside the soft-max.
        self._is_closed = objective.is_soft_max and matrix.trains_rows
        self._kept: dict[int, Tensor] = {}  # scores by tile, or in closed form the soft-max of this rank's columns
        self._largest: dict[int, Largest] = {}  # by block
        self._statistics_RS: Tensor | None = None
        self._scratch_tP: Tensor | None = None

    @torch.no_grad()
    def statistics(self, keep_bytes: int = 0) -> tuple[Tensor, int]:
        """Return the statistics of all rows, (R, S), and the bytes of the scores that were kept, at most keep_bytes."""
        kept_bytes, found = 0, []
        for rows in self._tiles():
            size = (rows.stop - rows.start) * self._row_bytes
            keeps = kept_bytes + size <= keep_bytes
            if keeps:
                self._kept[rows.start] = self._row_RD.new_empty(rows.stop - rows.start, len(self._column_PD), dtype=self._dtype)
                kept_bytes += size
            score_tP = self._scores(rows, self._kept.get(rows.start))
            if self._fuses:
                found.append(fused.row_log_sum_exp(score_tP, self._matrix.scale)[:, None])
                continue
            for block in self._blocks(rows):
                score_bP = score_tP[block.start - rows.start : block.stop - rows.start]
                if self._is_closed:
                    self._largest[block.start] = largest = take_soft_max(score_bP, self._matrix.scale, keeps)
                    found.append(largest.log_sum_exp()[:, None])
                else:
                    found.append(self._statistics(self._tile(score_bP, block)))
        self._statistics_RS = torch.cat(found) if found else self._row_RD.new_zeros(0, num_statistics(self._objective))
        return self._statistics_RS, kept_bytes

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
            is_kept = rows.start in self._kept
            score_tP = self._kept.pop(rows.start) if is_kept else self._scores(rows)
            if self._fuses:
                gradient_tP, has_scale = self._fused_gradient(score_tP, rows, derivative, total)
            elif self._is_closed:
                gradient_tP, has_scale = self._closed_gradient(score_tP, rows, derivative, is_kept), False
            else:
                gradient_tP, has_scale = self._plain_gradient(score_tP, rows, derivative, total)
            self._add_products(total, rows, gradient_tP.to(self._row_RD.dtype), has_scale)
        self._scratch_tP = None
        return total

    def _statistics(self, tile: Tile) -> Tensor:
        return compiled_statistics(self._objective, tile) if self._compiles else self._objective.statistics(tile)

    def _plain_gradient(self, score_tP: Tensor, rows: slice, derivative: Derivative, total: TileGradients) -> tuple[Tensor, bool]:
        """Put the gradient of the raw scores in the place of the scores; return it, and whether the scale's is in the total."""
        has_scale = True
        for block in self._blocks(rows):
            score_bP = score_tP[block.start - rows.start : block.stop - rows.start]
            has_scale = self._differentiate(score_bP, block, derivative, total)
        return score_tP, has_scale

    def _differentiate(self, score_bP: Tensor, block: slice, derivative: Derivative, total: TileGradients) -> bool:
        """Do so for one block."""
        matrix, objective = self._matrix, self._objective
        leaves = {"scores": score_bP.detach().requires_grad_(), "scale": matrix.scale.detach().requires_grad_()}
        if objective.returns_positive:
            leaves["positive"] = matrix.positive_R[block].detach().requires_grad_()

        def logits() -> Tensor:
            if "logits" not in leaves:
                leaves["logits"] = (score_bP.detach() * matrix.scale.detach()).requires_grad_()
            return leaves["logits"]

        with torch.enable_grad():
            tile = self._tile(leaves["scores"], block, leaves["scale"], leaves.get("positive"), logits)
            statistics_bS = self._statistics(tile)
        derivative_bS = derivative(block, statistics_bS.detach())
        parameters = trained_parameters(objective)
        found = torch.autograd.grad(
            statistics_bS, [*leaves.values(), *parameters], derivative_bS.to(statistics_bS.dtype), allow_unused=True
        )
        gradient = dict(zip(leaves, found, strict=False))
        for sum_of, value in zip(total.parameters, found[len(leaves) :], strict=True):
            if value is not None:
                sum_of += value
        if gradient["scale"] is not None:
            total.scale += gradient["scale"]
        if total.positive_R is not None and gradient.get("positive") is not None:
            total.positive_R[block] += gradient["positive"]
        of_logits, of_scores = gradient.get("logits"), gradient["scores"]
        has_scale = of_logits is None or of_scores is not None or not matrix.trains_rows
        if of_logits is None:
            score_bP.zero_() if of_scores is None else score_bP.copy_(of_scores)
        else:
            self._fill(of_logits, block, 0.0)
            if has_scale:
                total.scale += (of_logits * score_bP).sum(dtype=torch.float64)
            torch.mul(of_logits, matrix.scale, out=score_bP)
            if of_scores is not None:
                score_bP.add_(of_scores)
        if of_scores is not None:
            self._fill(score_bP, block, 0.0)
        return has_scale

    def _closed_gradient(self, score_tP: Tensor, rows: slice, derivative: Derivative, is_kept: bool) -> Tensor:
        """Put the gradient of the raw scores, of rows of the soft-max kind, in the place of the scores; return it."""
        scale = self._matrix.scale
        for block in self._blocks(rows):
            score_bP = score_tP[block.start - rows.start : block.stop - rows.start]
            largest, is_soft_max = self._largest.pop(block.start, None), is_kept
            if largest is None:  # one sweep
                largest, is_soft_max = take_soft_max(score_bP, scale, keeps=True), True
            derivative_b = derivative(block, largest.log_sum_exp()[:, None])[:, 0].to(self._dtype)
            put_gradient(score_bP, scale, largest, derivative_b, is_soft_max)
        return score_tP

    def _fused_gradient(self, score_tP: Tensor, rows: slice, derivative: Derivative, total: TileGradients) -> tuple[Tensor, bool]:
        """Return the same of rows of the soft-max kind, in the type of the products."""
        scale = self._matrix.scale
        statistics_tS = None if self._statistics_RS is None else self._statistics_RS[rows]
        if statistics_tS is None:
            statistics_tS = fused.row_log_sum_exp(score_tP, scale)[:, None]
        derivative_t = derivative(rows, statistics_tS)[:, 0].to(self._dtype)
        narrow, log_sum_t = self._row_RD.dtype, statistics_tS[:, 0]
        if not self._matrix.trains_rows:
            soft_max_tP = fused.soft_max_gradient(score_tP, scale, log_sum_t, derivative_t, torch.empty_like(score_tP))
            total.scale += (soft_max_tP * score_tP).sum(dtype=torch.float64)
        out_tP = score_tP if narrow == score_tP.dtype else torch.empty_like(score_tP, dtype=narrow)
        gradient_tP = fused.soft_max_gradient(score_tP, scale, log_sum_t, derivative_t * scale, out_tP)
        return gradient_tP, not self._matrix.trains_rows

    def _add_products(self, total: TileGradients, rows: slice, gradient_tP: Tensor, has_scale: bool) -> None:
        row_tD = self._row_RD[rows]
        if total.row_RD is not None:
            gradient_tD = product(gradient_tP, self._column_PD, out=total.row_RD[rows])
            if not has_scale:
                # The gradient of the scale is that of the scores times the scores, over the scale; a row's sum of them is
                # its embedding times its gradient.
                total.scale += (row_tD * gradient_tD).sum(dtype=torch.float64) / self._matrix.scale
        if total.column_PD is not None:
            add_product(total.column_PD, gradient_tP[:, : len(total.column_PD)].T, row_tD)

    def _scores(self, rows: slice, out_tP: Tensor | None = None) -> Tensor:
        """Return the raw scores of a tile, FLOOR where masked."""
        if out_tP is None:
            if self._scratch_tP is None:
                self._scratch_tP = self._new_tile()
            out_tP = self._scratch_tP[: rows.stop - rows.start]
        product(self._row_RD[rows], self._column_PD.T, out=out_tP)
        for block in self._blocks(rows):
            self._fill(out_tP[block.start - rows.start : block.stop - rows.start], block, FLOOR)
        return out_tP

    def _fill(self, values_bP: Tensor, block: slice, value: float) -> None:
        masks = self._matrix.masks
        if len(masks.repeated):
            values_bP.index_fill_(1, masks.repeated, value)
        if masks.num_cells(block):
            values_bP[masks.cells(block)] = value

    def _tile(self, score_bP: Tensor, block: slice, scale=None, positive_b=None, make_logits=None) -> Tile:
        matrix = self._matrix
        second = None
        if matrix.second is not None:
            second = product(for_products(matrix.second[0][block]), for_products(matrix.second[1]).T)
        return Tile(
            scores_tP=score_bP,
            scale=matrix.scale if scale is None else scale,
            positive_t=matrix.positive_R[block] if positive_b is None else positive_b,
            kind_P=matrix.kind_P,
            row_values={name: values[block] for name, values in matrix.row_values.items()},
            second_tP=second,
            progress=matrix.progress,
            make_logits=make_logits,
        )

    def _tiles(self) -> Iterator[slice]:
        for start in range(0, len(self._row_RD), self._tile_rows):
            yield slice(start, min(start + self._tile_rows, len(self._row_RD)))

    def _blocks(self, rows: slice) -> Iterator[slice]:
        most = max(1, BLOCK_BYTES.get(self._kind, BLOCK_BYTES["cuda"]) // self._row_bytes)
        start = rows.start
        while start < rows.stop:
            stop = min(start + most, rows.stop)
            while stop - start > 1 and self._matrix.masks.num_cells(slice(start, stop)) > BLOCK_CELLS:
                stop = start + (stop - start + 1) // 2
            yield slice(start, stop)
            start = stop

    def _new_tile(self) -> Tensor:
        """Return memory for the scores of one tile; raises ValueError, with its size, if there is not enough."""
        try:
            return self._column_PD.new_empty(self._tile_rows, len(self._column_PD), dtype=self._dtype)
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, plain on a CPU
            if "memory" not in str(error).lower():
                raise
            raise ValueError(
                f"a tile of tile_rows={self._tile_rows} x {len(self._column_PD)} columns takes "
                f"{self._tile_rows * self._row_bytes / 2**30:.1f} GiB, more than the memory of {self._column_PD.device} has "
                "left; set tile_rows lower"
            ) from error


def rows_of_tile(row_bytes: int, device: torch.device) -> int:
    """Return how many rows of scores are evaluated at once."""
    rows = max(1, TILE_BYTES.get(device.type, TILE_BYTES["cuda"]) // row_bytes)
    fewest = FEWEST_ROWS.get(device.type, FEWEST_ROWS["cuda"])
    if device.type == "cuda" and rows < fewest:
        free, _ = torch.cuda.mem_get_info(device)
        rows = max(rows, min(fewest, free // 4 // row_bytes))
    return rows


def num_statistics(objective: Objective) -> int:
    """Return S."""
    return sum(merge.width for merge in objective.merges)
