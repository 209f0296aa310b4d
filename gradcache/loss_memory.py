"""What the loss of a step holds on one rank, in bytes, from sizes alone: before any batch is encoded.

Counted is what lives at once where most does: embeddings and what travelled of them, their gradients, the keys of all ranks'
texts, one tile of scores, and the scores that are kept for the gradient. Lists of masked cells are left out.
"""

import math
from dataclasses import dataclass

import torch

from gradcache.blocks import BLOCK_BYTES
from gradcache.exchange import Counts
from gradcache.free import Device
from gradcache.options import LossOptions
from gradcache.tiles import rows_of_tile
from gradcache.way import GIB, KEPT_ON_CPU_GIB, KEPT_SHARE, Way, choose_way, targets_travel
from gradcache.widths import plan_views

# Copies of a block that are made of its scores: by the closed form of a soft-max, and by autograd of any other objective.
CLOSED_COPIES, AUTOGRAD_COPIES = 2, 8
PASSAGE_KEYS, QUERY_KEYS = 3, 11  # 64-bit numbers that are held of each text of all ranks: keys, positives, first columns


@dataclass(frozen=True, kw_only=True)
class LossSizes:
    """How much a step brings, at most."""

    queries: int  # of all ranks
    passages: int  # of all ranks, those of every query counted
    width: int
    num_ranks: int
    is_even: bool = False  # every rank has as many of both, in every step: what travels then needs no copy that is padded

    @property
    def queries_here(self) -> int:
        """Queries of a rank."""
        return math.ceil(self.queries / self.num_ranks)

    @property
    def passages_here(self) -> int:
        """Passages of a rank."""
        return math.ceil(self.passages / self.num_ranks)


@dataclass(frozen=True, kw_only=True)
class LossBytes:
    """What the loss holds where it holds most."""

    embeddings: int  # with what travelled of them, gradients, and keys
    tile: int
    kept_scores: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.embeddings + self.tile + self.kept_scores


def loss_bytes(options: LossOptions, sizes: LossSizes, device: Device, room_bytes: float) -> LossBytes:
    """Return what the loss of a step holds. room_bytes: what a rank has besides; a share of it may be kept as scores."""
    dtype = options.product_dtype or torch.float32
    views = plan_views(options.widths, options.width_weights, {"embedding": sizes.width}, options.outputs)
    is_spread = sizes.num_ranks > 1 and way_of_sizes(options, sizes, device).travels == "queries"
    here, passages_here = sizes.queries_here, sizes.passages_here
    if is_spread:
        rows, columns, travelled = sizes.queries, passages_here, sizes.queries * (2 if targets_travel(options) else 1)
        columns += options.same_side * here
    else:
        rows, columns = here, sizes.passages + options.same_side * sizes.queries
        travelled = sizes.passages + (sizes.queries if options.symmetric or options.same_side else 0)
        travelled *= sizes.num_ranks > 1
    num_terms = len(views) * (2 if options.symmetric else 1)
    narrow, own, whole = dtype.itemsize, here + passages_here, sizes.width * 4
    # As encoded, as multiplied, targets, what travelled, joined columns or cut views.
    copied = (rows + columns) * (options.same_side or options.widths is not None)
    widened = 4 * (rows + columns) * (narrow < 4 and device.type == "cpu")  # see products.py
    embeddings = sizes.width * (own * (4 + narrow * (narrow < 4)) + (here + travelled + copied) * narrow + widened)
    embeddings += 8 * (PASSAGE_KEYS * sizes.passages + QUERY_KEYS * sizes.queries)
    summed = (own + here + travelled) * whole  # of queries, targets, passages, and of what travelled
    in_tiles = (rows + columns) * whole + summed * (num_terms > 1)
    travels_alone = not options.objective.returns_positive and not (
        targets_travel(options) if is_spread else options.symmetric or options.same_side
    )
    packed = 0 if travels_alone and sizes.is_even else travelled
    behind = summed + (packed + 3 * own) * whole  # packed to travel; joined, of distinct rows, and of a chunk
    is_joint = options.partition == "joint"
    scores = 4 * rows * columns * len(views) * (2 if options.symmetric and (options.same_side or is_joint) else 1)
    keeps = is_spread or is_joint or options.objective.has_batch_numbers  # they look at the scores twice
    kept = int(min(scores, _may_keep(options, device, room_bytes))) if keeps else 0
    tile = _tile_bytes(options, rows, max(1, columns), narrow, device, is_kept=kept == scores)
    return LossBytes(embeddings=embeddings + max(in_tiles, behind - tile - kept), tile=tile, kept_scores=kept)


def way_of_sizes(options: LossOptions, sizes: LossSizes, device: Device) -> Way:
    """Return what will travel to the other ranks, where every rank brings as much as the largest."""
    here, there = [sizes.queries_here] * sizes.num_ranks, [sizes.passages_here] * sizes.num_ranks
    counts = Counts(queries=here, passages=there, extra=[0] * sizes.num_ranks, positives=here, hidden=here)
    views = plan_views(options.widths, options.width_weights, {"embedding": sizes.width}, options.outputs)
    no_rows = torch.empty(0, sizes.width, dtype=options.product_dtype or torch.float32, device="meta")
    return choose_way(options, counts, views, no_rows, sizes.num_ranks if sizes.num_ranks > 1 else None, device)


def _tile_bytes(options: LossOptions, rows: int, columns: int, narrow: int, device: Device, is_kept: bool) -> int:
    """Return the bytes of a tile of scores, if it is not one that is kept, its gradient in the type of products, and copies of a
    block of it.
    """
    tile = 4 * columns * min(rows, options.tile_rows or rows_of_tile(4 * columns, device))
    is_soft_max, on_gpu = options.objective.is_soft_max, device.type == "cuda"
    block = min(tile, max(4 * columns, BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"])))
    copies = 0 if is_soft_max and on_gpu else CLOSED_COPIES if is_soft_max else AUTOGRAD_COPIES
    return tile * (not is_kept) + (tile * narrow // 4 if on_gpu and narrow < 4 else 0) + copies * block


def _may_keep(options: LossOptions, device: Device, room_bytes: float) -> float:
    if options.keep_scores_gib is not None:
        return options.keep_scores_gib * GIB
    return KEPT_ON_CPU_GIB * GIB if device.type == "cpu" else KEPT_SHARE * room_bytes
