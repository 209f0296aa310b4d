"""Exact search against the product in it, shard by shard as a refresh does it, and kept nowhere by the product."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.bench.machine import matmul_rate, tiled_product
from launch.bench.turns import share_of_rate, speeds, take_turns
from trainer.encoder.topk import BestOf, tile_shape
from trainer.world import World

SHARD_ROWS = 8192  # of a shard of the service's
OURS, BARE = "ours", "bare product"


@dataclass(frozen=True)
class SearchSize:
    """How much is searched; embeddings are random, of length 1."""

    queries: int = 2048
    passages: int = 131072
    width: int = 384
    top_k: int = 200
    dtype: torch.dtype = torch.float32


def measure_search(size: SearchSize, world: World, rounds: int, wanted: dict[str, float]) -> dict[str, Any]:
    """Return what exact search takes, against the product in its tiles, embeddings being on the device."""
    device = world.device
    query_QD, passage_ND = (unit(n, size.width, size.dtype, device) for n in (size.queries, size.passages))

    def ours() -> None:
        best = BestOf(query_QD, size.top_k, device)
        for first, shard_ND in zip(range(0, size.passages, SHARD_ROWS), passage_ND.split(SHARD_ROWS), strict=True):
            best.look_at(shard_ND, np.arange(len(shard_ND)), first)
        best.keys()

    tile = tile_shape(size.top_k, device.type)
    ways: dict[str, Callable[[], object]] = {
        BARE: functools.partial(tiled_product, query_QD, passage_ND, tile),
        OURS: ours,
    }
    flops = 2 * size.queries * size.passages * size.width
    found = {"queries": size.queries, "passages": size.passages, "width": size.width, "top_k": size.top_k}
    turns = take_turns(ways, rounds, world)
    precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[size.dtype]
    found |= speeds(turns, wanted, flops / 1e9, "gflops")
    return found | share_of_rate(flops / turns[OURS].median_s, matmul_rate(device, size.dtype), precision)


def unit(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random vectors of length 1, (num_rows, width)."""
    chance = torch.Generator(device).manual_seed(num_rows)
    parts = (
        torch.randn(min(SHARD_ROWS, num_rows - first), width, generator=chance, device=device)
        for first in range(0, num_rows, SHARD_ROWS)
    )
    return torch.cat([torch.nn.functional.normalize(part, dim=1).to(dtype) for part in parts])
