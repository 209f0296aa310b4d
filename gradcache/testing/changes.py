"""An objective whose tiles are cut or filled in other ways, which must not change its loss, and what it means if that does."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradcache.objectives.tile import FLOOR, OTHER_SIDE, Merge, Objective, Rows, Tile, merge_all

# t rows of a tile, P columns, S statistics

COLUMN_CUTS = [(1,), (2, 3), (4, 4)]  # sizes of a tile's first parts; the rest is the last one
ATTRIBUTES = [
    "merges", "batch_merges", "gathered_width", "wants_siblings", "wants_own_negatives", "cell_values", "row_values", "second",
    "returns_positive", "is_soft_max", "column_hardness", "joins", "has_pair_scores",
]  # fmt: skip
MASKED = "masked cells are used: choose by `tile.is_negative`, or add up with `tile.sum`"


class Changed(Objective):
    """An objective of which some methods or attributes are others."""

    def __init__(self, objective: Objective, **others: Any):
        """others: methods and attributes by name."""
        self._objective = objective
        for name, value in ({name: getattr(objective, name) for name in ATTRIBUTES} | others).items():
            setattr(self, name, value)

    def statistics(self, tile: Tile) -> Tensor:
        """Return the objective's."""
        return self._objective.statistics(tile)

    def batch_statistics(self, rows: Rows) -> Tensor:
        """Return the objective's."""
        return self._objective.batch_statistics(rows)

    def loss(self, rows: Rows) -> Tensor:
        """Return the objective's."""
        return self._objective.loss(rows)

    def pair_scores(self, row_Bw: Tensor, positive_Bw: Tensor) -> Tensor:
        """Return the objective's."""
        return self._objective.pair_scores(row_Bw, positive_Bw)


@dataclass(frozen=True)
class Change:
    """An objective whose loss and gradients must be those of the unchanged one."""

    objective: Objective
    meaning: str  # of a difference: "the loss differs by 0.1 …"


def changes(objective: Objective) -> Iterator[Change]:
    """Yield all of them, the ones with the plainest meaning first."""

    def changed(change: Callable[[Tile], Tensor]) -> Objective:
        return Changed(objective, statistics=change)

    yield Change(changed(lambda tile: objective.statistics(_with_floor(tile))), f"with another score in masked cells; {MASKED}")
    yield Change(
        changed(lambda tile: objective.statistics(_with_masked_columns(tile))), f"where masked columns are added; {MASKED}"
    )
    yield Change(
        changed(lambda tile: _in_rows(objective, tile)),
        "where the rows are cut into tiles; `statistics` mixes its rows",
    )
    start = 0
    for number, merge in enumerate(objective.merges):
        own = slice(start, start + merge.width)
        start = own.stop
        for sizes in COLUMN_CUTS:
            yield Change(
                changed(functools.partial(_in_columns, objective, sizes=sizes, own=own)),
                f"where the columns are cut into tiles; number {number} of `merges` does not make the statistic of all "
                "columns from those of their parts, or `statistics` counts the columns of its tile",
            )
    if objective.batch_merges:
        merges = [replace(merge, merge=_of_parts(merge)) for merge in objective.batch_merges]
        yield Change(
            Changed(objective, batch_merges=merges),
            "where the rows are cut into ranks, one of them without rows; one of `batch_merges` does not make the number of all "
            "rows from those of their parts, or its identity is not that of no rows",
        )


def _with_floor(tile: Tile) -> Tile:
    return replace(tile, scores_tP=torch.where(tile.is_negative, tile.scores_tP, 3 * FLOOR))


def _with_masked_columns(tile: Tile) -> Tile:
    second = None if tile.second_tP is None else pad(tile.second_tP, (0, 3))
    return replace(
        tile,
        scores_tP=pad(tile.scores_tP, (0, 3), value=FLOOR),
        kind_P=pad(tile.kind_P, (0, 3), value=OTHER_SIDE),
        second_tP=second,
    )


def _in_rows(objective: Objective, tile: Tile) -> Tensor:
    parts = [slice(0, 1), slice(1, 3), slice(3, None)]
    return torch.cat([objective.statistics(_part(tile, rows, slice(None))) for rows in parts])


def _in_columns(objective: Objective, tile: Tile, *, sizes: Sequence[int], own: slice) -> Tensor:
    """Return the statistics; those in `own` are merged from tiles of some columns each."""
    num_columns, parts = tile.scores_tP.shape[1], []
    for size in torch.arange(num_columns).tensor_split(torch.tensor(sizes).cumsum(0)):
        try:
            parts.append(objective.statistics(_part(tile, slice(None), slice(int(size[0]), int(size[-1]) + 1))))
        except (RuntimeError, IndexError) as error:
            raise AssertionError(
                f"{type(objective).__name__}.statistics fails for a tile of {len(size)} columns: {error}"
            ) from error
    whole, merged = objective.statistics(tile), merge_all(torch.stack(parts), objective.merges)
    return torch.cat([whole[:, : own.start], merged[:, own], whole[:, own.stop :]], dim=1)


def _part(tile: Tile, rows: slice, columns: slice) -> Tile:
    return replace(
        tile,
        scores_tP=tile.scores_tP[rows, columns],
        positive_t=tile.positive_t[rows],
        kind_P=tile.kind_P[columns],
        row_values={name: values[rows] for name, values in tile.row_values.items()},
        second_tP=None if tile.second_tP is None else tile.second_tP[rows, columns],
    )


def _of_parts(merge: Merge) -> Callable[[Tensor], Tensor]:
    """Return the merge of the merges of some first parts, of no parts, and of the rest."""

    def merged(parts_WtS: Tensor) -> Tensor:
        nothing = torch.full_like(parts_WtS[0], merge.identity)
        return merge.merge(torch.stack([merge.merge(parts_WtS[:2]), nothing, merge.merge(parts_WtS[2:])]))

    return merged
