"""The loss on several ranks, each with columns of its own: time of both ways of gathering, and memory by hard negatives.

Where queries travel, a rank contrasts the rows of all ranks with its own columns; where passages travel, its own rows with the
columns of all. Both are as many scores, so both stand against the same bare products.
"""

from collections.abc import Callable
from typing import Any

import psutil
import torch

from launch.bench.loss import BARE, SIZES, about, check_size
from launch.bench.machine import freed_at_once, measured
from launch.bench.moved import Moved
from launch.bench.stage import BareProducts, Stage, make_stage, unit_rows
from launch.bench.turns import compared, take_turns
from launch.counted import counted
from launch.ranks import answer
from trainer.encoder.encode import DTYPES
from trainer.errors import InputError
from trainer.world import World, join_world

GIB = 2**30
KEPT, AGAIN, PASSAGES = "ours: queries, kept", "ours: queries, again", "ours: passages"  # what travels, and the scores
WANTED = {KEPT: 1.2, AGAIN: 1.55}  # of the time of the bare products
MEMORY_QUERIES = 4096  # of a rank, where memory is the question
HARD_NEGATIVES = (0, 1, 7)  # of a query


def bench_loss_on_ranks(
    rows: int | None, columns: int | None, width: int | None, rounds: int, half: bool | None
) -> dict[str, Any] | None:
    """Return the tables on rank 0, None elsewhere; rows and columns of all ranks together. Collective."""
    world = join_world()
    try:
        found = measure(world, rows, columns, width, rounds, half)
        return found if world.speaks else None
    finally:
        world.leave()


def measure(
    world: World, rows: int | None, columns: int | None, width: int | None, rounds: int, half: bool | None
) -> dict[str, Any]:
    """Return the tables. Collective."""
    default = SIZES[world.device.type][0]
    rows, columns = rows or columns or default[0], columns or rows or default[1]
    own_rows, own_columns = rows // world.num_ranks, columns // world.num_ranks
    if not own_rows:
        raise InputError(f"{counted(rows, 'row')} for {counted(world.num_ranks, 'rank')}; set --rows higher")
    check_size(own_rows, own_columns)
    found = about(world, width, half) | {"ranks": world.num_ranks, "rounds": rounds}
    dtype = DTYPES[found["precision"]]
    # Memory comes first: a process that has held more gives little of it back.
    queries = min(MEMORY_QUERIES, own_rows)
    memory = [_memory(world, queries, negatives, found["width"], dtype) for negatives in HARD_NEGATIVES]
    found |= _times(world, own_rows, own_columns, found["width"], dtype, rounds)
    return found | {"memory": {"queries_per_rank": queries, "by_negatives": memory}}


def _times(world: World, own_rows: int, own_columns: int, width: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Return what each way takes, and the bare products of as many scores. Collective."""
    rows = own_rows * world.num_ranks
    kept_gib = 4 * rows * own_columns / GIB
    _check_memory(world, kept_gib)
    stage = make_stage(own_rows, own_columns, width, dtype, world.device, world.group)
    bare = BareProducts(unit_rows(rows, width, world.device, dtype, seed=99), stage.agreed.embedding_nD[own_rows:])
    ways: dict[str, Callable[[], Any]] = {
        BARE: bare.run,
        KEPT: lambda: stage.loss(gather="queries", keep_scores_gib=kept_gib),
        AGAIN: lambda: stage.loss(gather="queries", keep_scores_gib=0.0),
        PASSAGES: lambda: stage.loss(gather="passages"),
    }
    sides = compared(take_turns(ways, rounds, world), BARE, WANTED)
    return {"rows": rows, "columns": own_columns, "kept_gib": round(kept_gib, 3), "sides": sides}


def _check_memory(world: World, kept_gib: float) -> None:
    """Raise InputError, on every rank alike, where the kept scores would not fit."""
    free_gib = psutil.virtual_memory().available / GIB / world.num_ranks
    if world.device.type == "cuda":
        free_gib = torch.cuda.mem_get_info(world.device)[0] / GIB
    if world.all_max([int(kept_gib > 0.9 * free_gib)])[0]:
        raise InputError(
            f"the kept scores take {kept_gib:.1f} GiB of a rank, and {free_gib:.1f} GiB of memory are free for it; set --rows "
            "and --columns lower"
        )


def _memory(world: World, queries: int, negatives: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the memory of a step beyond the embeddings, and what a rank moves, by what travels. Collective."""
    stage = make_stage(queries, queries * (1 + negatives), width, dtype, world.device, world.group)
    found: dict[str, Any] = {"hard_negatives": negatives}
    for travels in ("queries", "passages"):
        found[travels] = _one_step(world, stage, travels)
    return found


def _one_step(world: World, stage: Stage, travels: str) -> dict[str, Any]:
    moved = Moved(world.num_ranks)
    world.barrier()
    with freed_at_once(), measured(world.device) as cost, moved:
        way = stage.loss(gather=travels, keep_scores_gib=0.0)
    peak_kib, moved_bytes = world.all_max([int(cost.peak_gib * 2**20), moved.num_bytes])
    return {
        "peak_gib": round(peak_kib / 2**20, 4),
        "moved_bytes": moved_bytes,
        "foreseen_bytes": int(way.foreseen_bytes),
    }


if __name__ == "__main__":
    answer(bench_loss_on_ranks)
