"""What travels to the other ranks: the passages or the queries. Every rank comes to the same choice by the same numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradcache.exchange import Counts
from gradcache.free import Device, free_bytes, total_bytes
from gradcache.options import LossOptions
from gradcache.tiles import num_statistics
from gradcache.widths import View

GIB = 2**30
KEPT_ON_CPU_GIB = 1.0  # of scores, if nothing is said; ranks of one machine share its memory
KEPT_SHARE = 0.25  # of what is free on a GPU
# Products that cost as much time as one byte moved: a GPU of 400 TFLOP/s at 50 GB/s, a core of 70 GFLOP/s at 2 GB/s.
PRODUCTS_PER_BYTE = {"cpu": 35, "cuda": 8000}


@dataclass(frozen=True)
class Way:
    """What travels, and why."""

    travels: Literal["passages", "queries"]
    reason: str
    foreseen_bytes: float = 0.0  # that a rank moves in a step


def choose_way(
    options: LossOptions,
    counts: Counts,
    views: Sequence[View],
    passage_nD: Tensor,
    num_ranks: int | None,
    planned_for: Device | None = None,
) -> Way:
    """Return the way that is asked for, or the one that is cheaper by bytes and products.

    passage_nD: this rank's, for their width, type and device. num_ranks: None in one process.
    planned_for: the device of a plan, where it is not that of passage_nD.
    Raises ValueError, on every rank alike, where the columns that only one rank holds would be needed on others.
    """
    has_extra = sum(counts.extra) > 0
    if has_extra and options.gather == "passages" and num_ranks is not None:
        raise ValueError(
            'gather="passages" lets each rank see all columns, and extra columns stay on their rank; '
            'set gather="queries" or "auto"'
        )
    if num_ranks is None:
        return Way("queries" if options.gather == "queries" else "passages", "one process holds all rows")
    device = planned_for or passage_nD.device
    costs = {way: _cost(way, options, counts, views, passage_nD, num_ranks, device) for way in ("passages", "queries")}
    words = ", ".join(f"{way} {moved / GIB:.3g} GiB" for way, (moved, _) in costs.items())
    again = costs["queries"][1]
    if again:
        words += f" and {again / 1e12:.3g} TFLOP of products again"
    words = f"a rank would move for {words} a step"
    if options.gather != "auto":
        return Way(options.gather, f"asked for; {words}", costs[options.gather][0])
    if has_extra:
        return Way("queries", f"some columns stand on one rank alone; {words}", costs["queries"][0])
    rate = PRODUCTS_PER_BYTE.get(device.type, PRODUCTS_PER_BYTE["cuda"])
    cheaper = min(costs, key=lambda way: costs[way][0] + costs[way][1] / rate)
    return Way("queries" if cheaper == "queries" else "passages", words, costs[cheaper][0])


def _cost(
    way: str,
    options: LossOptions,
    counts: Counts,
    views: Sequence[View],
    passage_nD: Tensor,
    num_ranks: int,
    device: Device,
) -> tuple[float, float]:
    """Return the bytes that a rank moves and the operations that it repeats."""
    num_queries, num_passages = sum(counts.queries), sum(counts.passages)
    row_bytes = passage_nD.shape[1] * (passage_nD.element_size() + 4)  # there, and the gradient back
    share = (num_ranks - 1) / num_ranks
    if way == "passages":
        rows = num_passages + (num_queries if options.symmetric or options.same_side else 0)
        return rows * row_bytes * share, 0.0
    rows = num_queries * (2 if targets_travel(options) else 1)
    spread = 2 if options.symmetric and options.same_side else 1
    numbers = 8 * num_queries * num_statistics(options.objective) * len(views) * spread
    own_columns = max(counts.passages) + (max(counts.queries) if options.same_side else 0) + max(counts.extra)
    scores = 4 * num_queries * own_columns * len(views) * spread
    again = max(0.0, 1 - kept_by_default(options, device) / max(1, scores))
    products = 2 * num_queries * own_columns * sum(view.stop - view.first for view in views) * spread
    return (rows * row_bytes + numbers) * share, products * again


def targets_travel(options: LossOptions) -> bool:
    """Return whether each query's own passage travels with it: as a row, or as one of the second matrix."""
    return (options.symmetric and options.same_side) or options.objective.second == "positive"


def kept_by_default(options: LossOptions, device: Device) -> float:
    """Return the bytes of scores that a step may keep, as the choice of a way sees it: alike on all ranks."""
    if options.keep_scores_gib is not None:
        return options.keep_scores_gib * GIB
    return KEPT_ON_CPU_GIB * GIB if device.type == "cpu" else KEPT_SHARE * total_bytes(device)


def keep_bytes(options: LossOptions, device: torch.device) -> int:
    """Return the bytes of scores that this rank keeps. Raises ValueError for more than its memory."""
    asked, memory = options.keep_scores_gib, total_bytes(device)
    if asked is not None and asked * GIB > memory:
        raise ValueError(
            f"keep_scores_gib={asked:g} is more than the {memory / GIB:.1f} GiB of memory that {device} has; set it lower"
        )
    if asked is None and device.type == "cuda":
        return int(KEPT_SHARE * free_bytes(device))
    return int(kept_by_default(options, device))
