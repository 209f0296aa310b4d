"""`negpool bench loss`: the loss and its gradients from embeddings, against the three matrix products it cannot do without.

One process has all columns of its rows. `launch/bench/loss_ranks.py` measures several ranks, each with columns of its own. The
peer's loss stage has its turn on a smaller square, at the best of its tile sizes. Memory is the peak above the embeddings,
gradients included.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from launch.bench.machine import describe, matmul_rate
from launch.bench.peer import NOT_INSTALLED
from launch.bench.stage import SCALE, BareProducts, make_stage, unit_rows
from launch.bench.turns import compared, take_turns
from trainer.encoder.encode import DTYPES
from trainer.errors import InputError
from trainer.world import World, join_world

SIZES = {"cpu": [(65536, 65536)], "cuda": [(65536, 65536), (4096, 1048576)]}  # rows and columns, where none are asked for
WIDTH = {"cpu": 384, "cuda": 768}
WANTED = {"cpu": 1.1, "cuda": 1.3}  # of the time of the bare products
BARE, OURS, PEER = "bare products", "ours", "sentence-transformers"
PEER_ROWS = 8192
PEER_TILES = {"cpu": (32, 128, 512), "cuda": (128, 512, 1024)}


def bench_loss(
    rows: int | None, columns: int | None, width: int | None, rounds: int, half: bool | None, peer: bool
) -> dict[str, Any]:
    """Return the table; None: what suits the device. half: bfloat16 embeddings and products, float32 sums."""
    world = join_world()
    try:
        return _bench(world, rows, columns, width, rounds, half, peer)
    finally:
        world.leave()


def _bench(
    world: World, rows: int | None, columns: int | None, width: int | None, rounds: int, half: bool | None, peer: bool
) -> dict[str, Any]:
    sizes = SIZES[world.device.type]
    if rows is not None or columns is not None:
        sizes = [(rows or columns or 0, columns or rows or 0)]
    for size in sizes:
        check_size(*size)
    loss_class = _peer_class() if peer else None
    found = about(world, width, half) | {"rounds": rounds}
    dtype = DTYPES[found["precision"]]
    found["sizes"] = [measure_size(world, *size, found["width"], dtype, rounds) for size in sizes]
    if peer:
        found["peer"] = _against_peer(loss_class, found["width"], dtype, rounds, world)
    return found


def about(world: World, width: int | None, half: bool | None) -> dict[str, Any]:
    """Return the machine, and the width and precision that are asked for or suit it."""
    device = world.device
    half = device.type == "cuda" if half is None else half
    products = "bf16" if half and device.type == "cuda" else "fp32"  # a CPU multiplies in float32
    return {
        **describe(device),
        "width": width or WIDTH[device.type],
        "precision": "bf16" if half else "fp32",
        "products": products,
        "matmul_gflops": round(matmul_rate(device, DTYPES[products]) / 1e9, 1),
    }


def check_size(rows: int, columns: int) -> None:
    """Raise InputError where a row would have no positive of its own."""
    if rows > columns:
        raise InputError(f"{rows} rows need as many columns for their positives, and there are {columns}; set --columns higher")


def measure_size(world: World, rows: int, columns: int, width: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Return what the loss and its gradients take, and the bare products of as many scores. Embeddings are of dtype."""
    stage = make_stage(rows, columns, width, dtype, world.device)
    bare = BareProducts(*stage.agreed.embedding_nD.split([rows, columns]))
    ways: dict[str, Callable[[], Any]] = {BARE: bare.run, OURS: stage.loss}
    turns = take_turns(ways, rounds, world)
    if turns.keys() != ways.keys():
        raise InputError(f"the loss of {rows:,} x {columns:,} does not fit into memory; set --rows or --columns lower")
    sides = compared(turns, BARE, {OURS: WANTED[world.device.type]})
    return {"rows": rows, "columns": columns, "flops": 6 * rows * columns * width, "sides": sides}


def _peer_class() -> Any:
    try:
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
    except ImportError as error:
        raise InputError(NOT_INSTALLED) from error
    return CachedMultipleNegativesRankingLoss


def _against_peer(loss_class: Any, width: int, dtype: torch.dtype, rounds: int, world: World) -> dict[str, Any] | None:
    """Return our time over the peer's for a square of PEER_ROWS, and the peer's tile; None: no tile of its fits into memory.

    In half precision the peer multiplies under autocast, as it does in a training.
    """
    device = world.device
    query, passage = (unit_rows(PEER_ROWS, width, device, torch.float32, seed) for seed in range(2))
    stage = make_stage(PEER_ROWS, PEER_ROWS, width, dtype, device)

    def theirs(tile: int) -> None:
        loss = loss_class(torch.nn.Sequential(torch.nn.Identity()), scale=SCALE, mini_batch_size=tile)
        leaves = [[part.clone().requires_grad_() for part in side.split(tile)] for side in (query, passage)]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss.calculate_loss(leaves, with_backward=True)

    ways = {f"{PEER}, tiles of {tile}": functools.partial(theirs, tile) for tile in PEER_TILES[device.type]}
    turns = take_turns({**ways, OURS: stage.loss}, rounds, world)
    tiles = [tile for name, tile in zip(ways, PEER_TILES[device.type], strict=True) if name in turns]
    if not tiles:
        return None
    best = min(tiles, key=lambda tile: turns[f"{PEER}, tiles of {tile}"].median_s)
    seconds = turns[OURS].median_s, turns[f"{PEER}, tiles of {best}"].median_s
    return {
        "rows": PEER_ROWS,
        "mini_batch_size": best,
        "seconds": {PEER: round(seconds[1], 4), OURS: round(seconds[0], 4)},
        "ratio": round(seconds[0] / seconds[1], 3),
    }
