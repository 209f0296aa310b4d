"""`negpool bench loss`: the loss and its gradients from embeddings, against the three matrix products it cannot do without.

One process has all columns of its rows. `launch/bench/loss_ranks.py` measures several ranks, each with columns of its own. The
peer's loss stage has its turn on a smaller square, at the best of its tile sizes. Memory is the peak above the embeddings,
gradients included.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from launch.bench.machine import describe, matmul_rate, seconds_of
from launch.bench.stage import SCALE, BareProducts, make_stage, unit_rows
from launch.bench.turns import compared, take_turns
from trainer.errors import InputError
from trainer.world import World, join_world

SIZES = {"cpu": [(65536, 65536)], "cuda": [(65536, 65536), (4096, 1048576)]}  # rows and columns, where none are asked for
WIDTH = {"cpu": 384, "cuda": 768}
WANTED = {"cpu": 1.1, "cuda": 1.3}  # of the time of the bare products
BARE, OURS = "bare products", "ours"
PEER_ROWS = 8192
PEER_TILES = (32, 128, 512)


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
    device = world.device
    sizes = SIZES[device.type]
    if rows is not None or columns is not None:
        sizes = [(rows or columns or 0, columns or rows or 0)]
    for size in sizes:
        check_size(*size)
    loss_class = _peer_class() if peer else None
    found = about(world, width, half) | {"rounds": rounds}
    found["sizes"] = [_measure(world, *size, found["width"], found["precision"] == "bf16", rounds) for size in sizes]
    if peer:
        found["peer"] = _against_peer(loss_class, found["width"], rounds, device)
    return found


def about(world: World, width: int | None, half: bool | None) -> dict[str, Any]:
    """Return the machine, and the width and precision that are asked for or suit it."""
    device = world.device
    half = device.type == "cuda" if half is None else half
    multiplied_in = torch.bfloat16 if half and device.type == "cuda" else torch.float32  # a CPU multiplies in float32
    return {
        **describe(device),
        "width": width or WIDTH[device.type],
        "precision": "bf16" if half else "fp32",
        "matmul_gflops": round(matmul_rate(device, multiplied_in) / 1e9, 1),
    }


def check_size(rows: int, columns: int) -> None:
    """Raise InputError where a row would have no positive of its own."""
    if rows > columns:
        raise InputError(f"{rows} rows need as many columns for their positives, and there are {columns}; set --columns higher")


def _measure(world: World, rows: int, columns: int, width: int, half: bool, rounds: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if half else torch.float32
    stage = make_stage(rows, columns, width, dtype, world.device)
    bare = BareProducts(*stage.agreed.embedding_nD.split([rows, columns]))
    ways: dict[str, Callable[[], Any]] = {BARE: bare.run, OURS: stage.loss}
    sides = compared(take_turns(ways, rounds, world), BARE, {OURS: WANTED[world.device.type]})
    return {"rows": rows, "columns": columns, "flops": 6 * rows * columns * width, "sides": sides}


def _peer_class() -> Any:
    try:
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
    except ImportError as error:
        raise InputError("the peer is not installed; run: pip install 'negpool[bench]', or use --no-peer") from error
    return CachedMultipleNegativesRankingLoss


def _against_peer(loss_class: Any, width: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Return our time over the peer's for a square of PEER_ROWS, and the peer's tile."""
    query, passage = (unit_rows(PEER_ROWS, width, device, torch.float32, seed) for seed in range(2))
    stage = make_stage(PEER_ROWS, PEER_ROWS, width, torch.float32, device)

    def theirs(tile: int) -> None:
        loss = loss_class(torch.nn.Sequential(torch.nn.Identity()), scale=SCALE, mini_batch_size=tile)
        leaves = [[part.clone().requires_grad_() for part in side.split(tile)] for side in (query, passage)]
        loss.calculate_loss(leaves, with_backward=True)

    seconds: dict[int, list[float]] = {tile: [] for tile in PEER_TILES}
    ours = []
    for _ in range(rounds):
        for tile in PEER_TILES:
            seconds[tile].append(seconds_of(lambda tile=tile: theirs(tile), device))
        ours.append(seconds_of(stage.loss, device))
    medians = {tile: statistics.median(turns) for tile, turns in seconds.items()}
    best = min(medians, key=lambda tile: medians[tile])
    return {
        "rows": PEER_ROWS,
        "mini_batch_size": best,
        "seconds": {"sentence-transformers": round(medians[best], 3), OURS: round(statistics.median(ours), 3)},
        "ratio": round(statistics.median(ours) / medians[best], 3),
    }
