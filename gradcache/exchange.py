"""What ranks send each other for the loss: a fixed number of messages a step; ranks may have different numbers of rows, or none.

Only detached tensors travel, outside autograd: the backward of a gather is the reduce-scatter below, called once for all
tiles. Rows are padded to the largest rank, because gloo and NCCL move equal parts fastest.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache.gates import all_gather as _all_gather
from gradcache.gates import reduce_scatter as _reduce_scatter
from gradcache.lost import naming_lost_ranks
from gradcache.ragged import Ragged
from gradcache.spans import span

# n rows here, N rows of all ranks, D width, Q queries, P passages and X extra columns of all ranks, V values of a query


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How much each rank has, rank by rank."""

    queries: list[int]
    passages: list[int]  # that are columns
    extra: list[int]
    positives: list[int]  # keys of judged positives
    hidden: list[int]  # keys of candidates that are no columns of their query's row

    def window(self, name: str, rank: int) -> range:
        """Return where a rank's rows stand among those of all ranks."""
        return window_of(getattr(self, name), rank)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The texts of all ranks by their content keys, ordered by rank, then by row within the rank."""

    passage_P: Tensor
    extra_X: Tensor
    query_Q: Tensor
    target_Q: Tensor  # of each query's own positive
    positives: Ragged  # of each query, its own one among them
    hidden: Ragged  # of each query's candidates that are no columns of its row
    values_QV: Tensor  # float64, what travels with the queries


def window_of(counts: Sequence[int], rank: int) -> range:
    """Return where a rank's part stands among those of all ranks, given the size of each."""
    first = sum(counts[:rank])
    return range(first, first + counts[rank])


def gather_integers(values_m: Tensor, group: dist.ProcessGroup | None) -> list[list[int]]:
    """Return the int64 values of every rank. Waits for the device, once. Collective: one small all-gather. Raises LostRank."""
    return gather_values(values_m, group).tolist()


def gather_values(values_S: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the values of every rank, (W, S). Collective: one small all-gather."""
    return values_S[None] if group is None else _gathered(values_S, group, "control").view(group.size(), -1)


def all_reduce(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum values over the ranks, in place, and return them. Collective. Raises LostRank."""
    if group is not None:
        with naming_lost_ranks(group), span("control", "all_reduce", values):
            dist.all_reduce(values, group=group)
    return values


def gather_keys(mine: Keys, counts: Counts, group: dist.ProcessGroup | None) -> Keys:
    """Return the keys of all ranks, from those of this rank. Collective: one all-gather, 8 bytes for each key and value."""
    if group is None:
        return mine
    num_values = mine.values_QV.shape[1]
    has_hidden = any(counts.hidden)
    ragged = [mine.positives.counts_n, mine.positives.values_m]
    ragged += [mine.hidden.counts_n, mine.hidden.values_m] if has_hidden else []
    pieces = [mine.passage_P, mine.extra_X, mine.query_Q, mine.target_Q, *ragged]
    packed = torch.cat([*pieces, mine.values_QV.flatten().view(torch.int64)])
    of_ranks = zip(counts.passages, counts.extra, counts.queries, counts.positives, counts.hidden, strict=True)
    sizes = [
        [passages, extra, queries, queries, queries, positives, *([queries, hidden] if has_hidden else []), queries * num_values]
        for passages, extra, queries, positives, hidden in of_ranks
    ]
    lengths = [sum(size) for size in sizes]
    blocks = _gathered(_padded(packed, max(lengths)), group, "control").view(len(lengths), -1)
    passage, extra, query, target, per_query, positive, *hidden, values = _by_part(blocks, sizes)
    return Keys(
        passage_P=passage,
        extra_X=extra,
        query_Q=query,
        target_Q=target,
        positives=Ragged(positive, per_query),
        hidden=Ragged(hidden[1], hidden[0]) if has_hidden else Ragged(positive[:0], torch.zeros_like(per_query)),
        values_QV=values.view(torch.float64).view(-1, num_values),
    )


def gather_rows(parts: Sequence[Tensor], counts: Sequence[list[int]], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Return the rows of all ranks of each part, (N, D) each. counts: of each part the rows of each rank.

    Collective: one all-gather for all parts.
    """
    if group is None or not parts:
        return list(parts)
    sizes = list(zip(*counts, strict=True))  # of each rank the rows of its parts
    most = max(map(sum, sizes))
    blocks = _gathered(_padded(torch.cat(list(parts)), most), group, "gather").view(len(sizes), most, parts[0].shape[1])
    return _by_part(blocks, sizes)


def scatter_gradients(parts: Sequence[Tensor], counts: Sequence[list[int]], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Return of each part the sum over the ranks of the gradients of this rank's rows, (n, D) each.

    parts: one row for each row of all ranks. They stay float32 also for bfloat16 embeddings, because the sum over many
    ranks would lose bits otherwise. Collective: one reduce-scatter for all parts.
    """
    if group is None or not parts:
        return list(parts)
    sizes = list(zip(*counts, strict=True))
    most = max(map(sum, sizes))
    if _is_even(sizes):
        packed = _by_rank(parts, counts)
    else:
        packed = parts[0].new_zeros(len(sizes), most, parts[0].shape[1])
        pieces = zip(*(part.split(count) for part, count in zip(parts, counts, strict=True)), strict=True)
        for block, of_rank in zip(packed, pieces, strict=True):
            torch.cat(of_rank, out=block[: sum(map(len, of_rank))])
    mine = packed.new_empty(most, parts[0].shape[1])
    with naming_lost_ranks(group), span("reduce_scatter", "reduce_scatter", packed):
        _reduce_scatter(mine, packed.view(-1, mine.shape[1]), group=group)
    own = sizes[group.rank()]
    return list(mine[: sum(own)].split(own))


def exchange(
    parts: Sequence[Tensor], sent: Sequence[list[int]], received: Sequence[list[int]], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Send each rank its values of each part, and return of each part what all have sent, rank after rank.

    parts: (m,) each, rank after rank. sent: of each part how many values belong to each rank. received: how many each sends.
    Collective: one all-to-all for all parts.
    """
    if group is None:
        return list(parts)
    of_ranks = list(zip(*received, strict=True))
    from_ranks, to_ranks = [sum(size) for size in of_ranks], [sum(size) for size in zip(*sent, strict=True)]
    every, packed = parts[0].new_empty(sum(from_ranks)), _by_rank(parts, sent)
    with naming_lost_ranks(group), span("statistics", "all_to_all", packed):
        dist.all_to_all_single(every, packed, from_ranks, to_ranks, group=group)
    if _is_even(of_ranks):
        return _by_part(every.view(len(of_ranks), -1), of_ranks)
    return _joined(every.split(from_ranks), of_ranks)


def starts(counts: Sequence[int]) -> list[int]:
    """Return where each rank's rows begin, and where all end."""
    return list(itertools.accumulate(counts, initial=0))


def _is_even(sizes: Sequence[Sequence[int]]) -> bool:
    """Tell whether each rank has as much of each part as the first; sizes: of each rank, of its parts."""
    first = tuple(sizes[0])
    return all(tuple(size) == first for size in sizes)


def _by_rank(parts: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> Tensor:
    """Return the values of all parts, rank after rank; counts: of each part those of each rank.

    Thousands of ranks with as many values each are one operation, others thousands. A single part stays where it is.
    """
    sizes = list(zip(*counts, strict=True))
    if len(parts) == 1:
        return parts[0].contiguous()
    if _is_even(sizes):
        blocks = [part.reshape(len(sizes), size, *part.shape[1:]) for part, size in zip(parts, sizes[0], strict=True)]
        return torch.cat(blocks, dim=1).flatten(0, 1)
    split = [part.split(list(count)) for part, count in zip(parts, counts, strict=True)]
    return torch.cat([piece for of_rank in zip(*split, strict=True) for piece in of_rank])


def _by_part(blocks: Tensor, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return each part of all ranks, from a block of each rank, which may have more behind; sizes: of each rank, of its parts.

    A single part that fills the blocks is no copy; any other leaves nothing of them.
    """
    if _is_even(sizes):
        if tuple(sizes[0]) == (blocks.shape[1],):
            return [blocks.flatten(0, 1)]
        parts = blocks[:, : sum(sizes[0])].split(list(sizes[0]), dim=1)
        return [part.clone(memory_format=torch.contiguous_format).flatten(0, 1) for part in parts]
    return _joined([block[: sum(size)] for block, size in zip(blocks, sizes, strict=True)], sizes)


def _joined(blocks: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Do the same for blocks of any lengths."""
    split = [block.split(list(size)) for block, size in zip(blocks, sizes, strict=True)]
    return [torch.cat(pieces) for pieces in zip(*split, strict=True)]


def _gathered(mine: Tensor, group: dist.ProcessGroup, phase: str) -> Tensor:
    """Return the tensors of all ranks, one behind the other. gloo knows no bfloat16: bytes travel."""
    every = mine.new_empty(group.size() * len(mine), *mine.shape[1:])
    with naming_lost_ranks(group), span(phase, "all_gather", every):
        _all_gather(every.view(torch.uint8), mine.contiguous().view(torch.uint8), group=group)
    return every


def _padded(rows: Tensor, num_rows: int) -> Tensor:
    if len(rows) == num_rows:
        return rows.contiguous()
    padded = rows.new_zeros(num_rows, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded
