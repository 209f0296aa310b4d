"""Rows of all ranks and back: one collective each way; ranks may have different numbers of rows, or none.

Only detached tensors travel, outside autograd: the backward of a gather is the reduce-scatter below, called once for all
tiles. Rows are padded to the largest rank, because gloo and NCCL move equal parts fastest.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache.lost import naming_lost_ranks

# n rows here, N rows of all ranks, D width, M extra values of a row

# torch 2.13 renamed both and warns of the old names at every call.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Pool:
    """Rows of all ranks, ordered by rank, then by row within the rank."""

    rows_ND: Tensor
    keys_N: Tensor  # int64 content keys
    extra_NM: Tensor  # int64 values that travelled with each row
    counts: list[int]  # rows of each rank
    first: int  # where this rank's rows begin


def gather_integers(values: list[int], group: dist.ProcessGroup | None, device: torch.device) -> list[list[int]]:
    """Return the values of every rank. Collective: one small all-gather. Raises LostRank."""
    if group is None:
        return [values]
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    every = mine.new_empty(group.size() * len(values))
    with naming_lost_ranks(group):
        _all_gather(every, mine, group=group)
    return every.view(group.size(), len(values)).tolist()


def all_reduce(values: Tensor, group: dist.ProcessGroup) -> None:
    """Sum values over the ranks, in place. Collective. Raises LostRank."""
    with naming_lost_ranks(group):
        dist.all_reduce(values, group=group)


def gather_rows(rows_nD: Tensor, keys_n: Tensor, extra_nM: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Pool:
    """Return the rows of all ranks with their keys and extra values.

    rows_nD: detached, of any floating type. keys_n, extra_nM: int64 on the same device; D and M (0 is fine) are the same
    on every rank. counts: rows of each rank.
    Collective: one all-gather of bytes.
    """
    if group is None:
        return Pool(rows_nD, keys_n, extra_nM, counts, 0)
    parts = [_as_bytes(keys_n[:, None]), _as_bytes(extra_nM), _as_bytes(rows_nD)]
    packed_nC = torch.cat(parts, dim=1)
    padded = packed_nC.new_zeros(max(counts), packed_nC.shape[1])
    padded[: len(packed_nC)] = packed_nC
    every = packed_nC.new_empty(group.size() * max(counts), packed_nC.shape[1])
    with naming_lost_ranks(group):
        _all_gather(every, padded, group=group)
    packed_NC = torch.cat([block[:count] for block, count in zip(every.split(max(counts)), counts, strict=True)])
    keys, extra, rows = packed_NC.split([part.shape[1] for part in parts], dim=1)
    return Pool(
        _from_bytes(rows, rows_nD.dtype),
        _from_bytes(keys, torch.int64)[:, 0],
        _from_bytes(extra, torch.int64),
        counts,
        sum(counts[: group.rank()]),
    )


def scatter_gradients(gradient_ND: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum over ranks of the gradients of this rank's rows, (n, D).

    gradient_ND: one row for each row of the pool. It stays float32 also for bfloat16 embeddings, because the sum over many
    ranks would lose bits otherwise. Collective: one reduce-scatter.
    """
    if group is None:
        return gradient_ND
    most, width = max(counts), gradient_ND.shape[1]
    padded = gradient_ND.new_zeros(group.size(), most, width)
    for block, part in zip(padded, gradient_ND.split(counts), strict=True):
        block[: len(part)] = part
    mine = gradient_ND.new_empty(most, width)
    with naming_lost_ranks(group):
        _reduce_scatter(mine, padded.view(-1, width), group=group)
    return mine[: counts[group.rank()]]


def _as_bytes(values_nC: Tensor) -> Tensor:
    return values_nC.contiguous().view(torch.uint8)


def _from_bytes(bytes_NC: Tensor, dtype: torch.dtype) -> Tensor:
    # A copy, because a view as another type needs aligned memory.
    values = torch.empty(len(bytes_NC), bytes_NC.shape[1] // dtype.itemsize, dtype=dtype, device=bytes_NC.device)
    values.view(torch.uint8).copy_(bytes_NC)
    return values
