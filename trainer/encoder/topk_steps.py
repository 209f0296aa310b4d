"""One step of exact search on a GPU: the passages of a block that may be among the k best of some queries, with their scores.

A matrix product's order of sums depends on its tile, so its scores only tell what to look at: whatever reaches the k-th best
score so far, less the most by which two orders of sums can differ, is scored by `pair_scores.sums_of_pairs`, and only that score
is kept. So the k best and their bits do not depend on tiles, blocks or their order. No tile of scores is ever in memory, only a
bit for each score.

Two ways do the same: Triton kernels, and plain torch, which is their reference and serves where Triton does not run.
Proven so far: the kernels under Triton's interpreter on a CPU, which finds no races, and that they compile for NVIDIA's
architectures 8.0 and 9.0 without spilling registers. Not yet run or timed on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.encoder.pair_scores import HALVINGS, LANES, sums_of_pairs
from trainer.encoder.score_keys import NOTHING, pack_keys, unpack_keys

# Q queries, C passages of a block, S places of a query, W words of 32 passages

MAX_COLUMNS = 8192  # passages of a block
ROUNDING = 2.0**-22  # of a sum: see `slack_of`
# Queries and passages of a tile, lanes of a step, warps and stages. The first is for GPUs with 160 KiB and more of shared
# memory a program (it takes 148), the others for all. By hand: what is chosen by time differs from run to run.
LARGE_TILE, SMALL_TILE, FLOAT32_TILE = (128, 256, 64, 8, 3), (128, 128, 32, 8, 3), (64, 128, 32, 8, 2)
PAIRS_AT_ONCE, TAKE_WARPS = 4, 2


@dataclass(frozen=True)
class Queries:
    """Some queries and what is known of each; all tensors are filled in place."""

    query_QD: Tensor  # float16 or float32
    norm_Q: Tensor  # float32
    least_Q: Tensor  # score of the k-th best when they were last put in order, float32; -inf: fewer than k
    key_QS: Tensor  # k best of then, and the capacity: keys of what came since, or NOTHING
    count_Q: Tensor  # how many came since, int32
    k: int

    def of(self, rows: slice | Tensor) -> "Queries":
        """Return some of the queries: of a slice the same memory, of numbers a copy."""
        return Queries(self.query_QD[rows], self.norm_Q[rows], self.least_Q[rows], self.key_QS[rows], self.count_Q[rows], self.k)

    def put_in_order(self) -> None:
        """Keep the k best keys of each, and free its other places."""
        best_Qk = self.key_QS.topk(self.k, sorted=False).values
        least_Q = unpack_keys(best_Qk.amin(1))[0]
        self.key_QS[:, : self.k] = best_Qk
        self.key_QS[:, self.k :] = NOTHING
        self.least_Q.copy_(least_Q)
        self.count_Q.zero_()


@dataclass(frozen=True)
class Block:
    """Some passages, at most MAX_COLUMNS; in the type of the queries."""

    passage_CD: Tensor
    id_C: Tensor  # int64
    largest: Tensor  # norm, scalar float32

    def of(self, columns: slice) -> "Block":
        return replace(self, passage_CD=self.passage_CD[columns], id_C=self.id_C[columns])


# Adds the keys of what may be among the k best to the free places of each query, and writes into over_Q (uint8) which queries
# have too few of them; those get none. Every score that is a number and at least the k-th best is found.
Take = Callable[[Queries, Block, Tensor], None]


def slack_of(width: int) -> float:
    """Return the most by which two orders of sums of an inner product differ, as a share of the product of the norms.

    A float32 sum of D rounded products is wrong by at most D 2^-24 of the sum of their sizes, which the norms bound (Cauchy
    and Schwarz). Tensor cores align up to 16 products and their sum to the largest and cut below its 24 bits: 17 cuts of 2^-23
    for 16 products (Fasi et al. 2021, doi 10.7717/peerj-cs.330). Together 1.6 D 2^-23; taken are 2, and some for the norms.
    """
    return (width + 32) * ROUNDING


def plain_take(queries: Queries, block: Block, over_Q: Tensor) -> None:
    """Take in plain torch, on any device; holds all scores, and waits for a GPU."""
    limit_Q = plain_limit(queries, block)
    # Not in float32, whose products a trainer may have rounded to TensorFloat-32.
    is_found_QC = queries.query_QD.double() @ block.passage_CD.T.double() >= limit_Q[:, None]
    stop_Q = queries.count_Q + is_found_QC.sum(1)
    over_Q.copy_(stop_Q > queries.key_QS.shape[1] - queries.k)
    is_found_QC &= (over_Q == 0)[:, None]
    slot_QC = queries.k + queries.count_Q[:, None] + is_found_QC.cumsum(1) - 1
    row_n, column_n = is_found_QC.nonzero(as_tuple=True)
    score_n = sums_of_pairs(queries.query_QD[row_n], block.passage_CD[column_n])
    queries.key_QS[row_n, slot_QC[row_n, column_n]] = pack_keys(score_n, block.id_C[column_n])
    queries.count_Q.add_(is_found_QC.sum(1).to(torch.int32))


def plain_limit(queries: Queries, block: Block) -> Tensor:
    """Return the least score of a product, (Q,), that may be among the k best; of no number it is the least there is."""
    limit_Q = queries.least_Q - slack_of(block.passage_CD.shape[1]) * queries.norm_Q * block.largest
    return limit_Q.nan_to_num(nan=-torch.inf, posinf=torch.inf).clamp(min=torch.finfo(torch.float32).min)


def take_by_kernels(queries: Queries, block: Block, over_Q: Tensor) -> None:
    """Take by two kernels; the host does not wait. Beside the arguments: a bit for each score."""
    from trainer.encoder.topk_kernels import take_kernel

    word_QW = mark_by_kernel(queries, block)
    with torch.cuda.device_of(over_Q):
        take_kernel[(len(over_Q),)](
            word_QW,
            queries.query_QD,
            block.passage_CD,
            block.id_C,
            queries.key_QS,
            queries.count_Q,
            over_Q,
            queries.query_QD.shape[1],
            word_QW.shape[1],
            queries.k,
            queries.key_QS.shape[1] - queries.k,
            W=MAX_COLUMNS // 32,
            R=PAIRS_AT_ONCE,
            L=LANES,
            HALVINGS=HALVINGS,
            num_warps=TAKE_WARPS,
            enable_fp_fusion=False,  # a fused product is not rounded
        )


def mark_by_kernel(queries: Queries, block: Block) -> Tensor:
    """Return a bit for each score, whether it may be among the k best, (Q, W) int32; bit 0 of word 0 is column 0."""
    from trainer.encoder.topk_kernels import mark_kernel

    (num_queries, width), num_passages = queries.query_QD.shape, len(block.passage_CD)
    assert max(num_queries, num_passages) * width < 1 << 31, "the kernel counts in int32"
    word_QW = torch.empty(num_queries, -(-num_passages // 32), dtype=torch.int32, device=block.passage_CD.device)
    rows, columns, step, num_warps, num_stages = _tile(queries.query_QD)
    num_tiles = -(-num_queries // rows) * -(-num_passages // columns)
    with torch.cuda.device_of(word_QW):  # Triton launches on the current device
        mark_kernel[(min(num_tiles, _num_programs(word_QW)),)](
            queries.query_QD,
            block.passage_CD,
            queries.least_Q,
            queries.norm_Q,
            block.largest,
            word_QW,
            num_queries,
            num_passages,
            width,
            word_QW.shape[1],
            slack_of(width),
            M=rows,
            N=columns,
            S=step,
            IS_WHOLE=width % step == 0,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return word_QW


def _tile(query_QD: Tensor) -> tuple[int, int, int, int, int]:
    if query_QD.dtype == torch.float32:
        return FLOAT32_TILE
    is_large = query_QD.is_cuda and torch.cuda.get_device_capability(query_QD.device) in ((8, 0), (9, 0), (10, 0), (10, 3))
    return LARGE_TILE if is_large else SMALL_TILE


def _num_programs(word_QW: Tensor) -> int:
    """Return how many programs share the tiles: on a GPU one for each multiprocessor, whose memory it fills."""
    return torch.cuda.get_device_properties(word_QW.device).multi_processor_count if word_QW.is_cuda else 2
