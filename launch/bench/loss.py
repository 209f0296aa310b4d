"""`negpool bench loss`: the loss and its gradients from embeddings, against the three matrix products it cannot do without.

The bare products run in the same tiles, because the whole matrix of scores would not fit: it is what nobody should hold.
The peer's loss stage has its turn on a smaller square, at the best of its tile sizes. Memory is the peak above the
embeddings, gradients included.
"""

import statistics
from typing import Any

import torch
from torch import Tensor

from gradcache import OBJECTIVES, Batch, LossOptions, Temperature, Tower
from gradcache.agree import Agreed
from gradcache.exchange import Counts
from gradcache.loss import global_loss
from gradcache.tiles import TILE_BYTES
from launch.bench.machine import describe, matmul_rate, measured
from launch.output import messages
from trainer.errors import InputError

SCALE = 20.0
PEER_ROWS = 8192
PEER_TILES = (32, 128, 512)


def bench_loss(rows: int, columns: int, width: int, rounds: int, half: bool, peer: bool) -> dict[str, Any]:
    """Return the table. half: bfloat16 embeddings and products, float32 sums."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if half else torch.float32
    rate = matmul_rate(device, dtype if device.type == "cuda" else torch.float32)  # what a CPU's tiles are multiplied in
    row_BD, column_PD = (_unit(n, width, device, dtype) for n in (rows, columns))
    costs: dict[str, list[tuple[float, float]]] = {"three bare products": [], "ours": []}
    for number in range(rounds):
        for name, work in (("three bare products", _bare), ("ours", _ours)):
            with measured(device) as cost:
                work(row_BD, column_PD)
            costs[name].append((cost.seconds, cost.peak_gib))
            messages().print(f"[dim]round {number + 1}: {name}: {cost.seconds:.2f} s, {cost.peak_gib:.2f} GiB[/dim]")
    seconds = {name: statistics.median(s for s, _ in turns) for name, turns in costs.items()}
    found = {
        **describe(device),
        "rows": rows,
        "columns": columns,
        "width": width,
        "precision": "bf16" if half else "fp32",
        "rounds": rounds,
        "matmul_gflops": round(rate / 1e9, 1),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "ratio": round(
            statistics.median(a / b for (a, _), (b, _) in zip(costs["ours"], costs["three bare products"], strict=True)), 3
        ),
        "peak_gib_beyond_embeddings": round(statistics.median(gib for _, gib in costs["ours"]), 3),
        "share_of_matmul_rate": round(6 * rows * columns * width / seconds["ours"] / rate, 3),
    }
    if peer:
        found["peer"] = _against_peer(width, rounds, device)
    return found


def _unit(num_rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(num_rows)
    return torch.nn.functional.normalize(torch.randn(num_rows, width, device=device), dim=1).to(dtype)


def _ours(row_BD: Tensor, column_PD: Tensor) -> None:
    num_rows, num_columns = len(row_BD), len(column_PD)
    keys = torch.arange(num_rows + num_columns)
    tower = Tower(encode=lambda rows: rows, lengths=torch.ones_like(keys), load=lambda rows: rows)
    target = torch.arange(num_rows)
    batch = Batch(towers=[tower], num_queries=num_rows, keys=keys, target=target, positive_keys=keys[num_rows:][target][:, None])
    counts = Counts(queries=[num_rows], passages=[num_columns], extra=[0], positives=[num_rows])
    agreed = Agreed(torch.cat([row_BD, column_PD]), counts, [num_rows + num_columns], 0, None)
    options = LossOptions(objective=OBJECTIVES["info_nce"])
    global_loss(batch, agreed, options=options, temperature=Temperature(1 / SCALE).to(row_BD.device), group=None)


def _bare(row_BD: Tensor, column_PD: Tensor) -> None:
    tile_rows = max(1, TILE_BYTES[row_BD.device.type] // (len(column_PD) * 4))
    score_tP = row_BD.new_empty(min(tile_rows, len(row_BD)), len(column_PD))
    row_gradient, column_gradient = torch.empty_like(row_BD), torch.zeros_like(column_PD)
    for start in range(0, len(row_BD), tile_rows):
        part = row_BD[start : start + tile_rows]
        score = torch.mm(part, column_PD.T, out=score_tP[: len(part)])
        torch.mm(score, column_PD, out=row_gradient[start : start + tile_rows])
        column_gradient.addmm_(score.T, part)


def _against_peer(width: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Return our time over the peer's for a square of PEER_ROWS, and the peer's tile."""
    try:
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
    except ImportError as error:
        raise InputError("the peer is not installed; run: pip install 'negpool[bench]', or use --no-peer") from error
    query, passage = (_unit(PEER_ROWS + i, width, device, torch.float32)[:PEER_ROWS] for i in range(2))

    def theirs(tile: int) -> None:
        loss = CachedMultipleNegativesRankingLoss(torch.nn.Sequential(torch.nn.Identity()), scale=SCALE, mini_batch_size=tile)  # type: ignore[arg-type]
        leaves = [[part.clone().requires_grad_() for part in side.split(tile)] for side in (query, passage)]
        loss.calculate_loss(leaves, with_backward=True)

    seconds: dict[int, list[float]] = {tile: [] for tile in PEER_TILES}
    ours = []
    for _ in range(rounds):
        for tile in PEER_TILES:
            with measured(device) as cost:
                theirs(tile)
            seconds[tile].append(cost.seconds)
        with measured(device) as cost:
            _ours(query, passage)
        ours.append(cost.seconds)
    medians = {tile: statistics.median(turns) for tile, turns in seconds.items()}
    best = min(medians, key=lambda tile: medians[tile])
    return {
        "rows": PEER_ROWS,
        "mini_batch_size": best,
        "seconds": {"sentence-transformers": round(medians[best], 3), "ours": round(statistics.median(ours), 3)},
        "ratio": round(statistics.median(ours) / medians[best], 3),
    }
