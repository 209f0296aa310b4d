"""What the ranks tell each other before the loss, and the errors that all of them raise together.

A problem of one rank has to end the step on every rank, or the others would wait for it. So it is sent together with the
numbers of rows, which the gather needs anyway.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache.batch import Batch
from gradcache.encode import Encoding
from gradcache.gather import gather_integers

SPREAD_UNIT = 1e-9  # of what travels as a whole number
_DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class NotFinite(ValueError):
    """An embedding is NaN or infinite: the model has diverged, or its input is broken. No gradient was computed."""

    def __init__(self, rank: int, row: int, num_queries: int, key: int):
        """rank, row: where the first of them stands. key: its content key."""
        side = f"query {row}" if row < num_queries else f"passage {row - num_queries}"
        super().__init__(
            f"the embedding of {side} of rank {rank} (key {key}) is not finite; the step was given up before any gradient. "
            "Set a lower learning rate or a wider precision, or look at that text"
        )
        self.rank, self.row, self.is_query, self.key = rank, row, row < num_queries, key


@dataclass(frozen=True)
class Agreed:
    """The rows of this rank, and what all ranks know of each other."""

    embedding_nD: Tensor
    num_queries: list[int]  # of each rank
    num_passages: list[int]
    num_positives: int  # keys of judged positives of a query, the most on any rank
    num_halved: int  # chunks that did not fit into memory, the most on any rank
    spread: float | None  # 1 - the mean cosine among the embeddings of a side on a rank, the most of all; 0: all are one


def agree(batch: Batch, encoding: Encoding, num_halved: int, group: dist.ProcessGroup | None, device: torch.device) -> Agreed:
    """Return what the loss needs. Collective: one small all-gather.

    Raises on every rank alike: ValueError if no rank has a query or the embeddings have several widths, NotFinite.
    """
    embedding_nD = encoding.embedding_nD
    widths = encoding.widths or {0}
    dtype = -1 if embedding_nD is None else _DTYPES.index(embedding_nD.dtype)
    row, key = _first_not_finite(batch, embedding_nD)
    counts = [batch.num_queries, batch.num_passages, batch.positive_keys.shape[1], num_halved]
    spread = -1 if embedding_nD is None or row >= 0 else _spread(embedding_nD, batch.num_queries)
    every = gather_integers([*counts, min(widths), max(widths), dtype, row, key, spread], group, device)
    columns = (list(column) for column in zip(*every, strict=True))
    num_queries, num_passages, most_positives, halved, narrowest, widest, dtypes, rows, keys, spreads = columns
    if sum(num_queries) == 0:
        raise ValueError("the batch has no query on any rank; expected at least one")
    distinct = {*narrowest, *widest} - {0}
    if len(distinct) > 1:
        found = " and ".join(map(str, sorted(distinct)))
        raise ValueError(f"the towers return embeddings of widths {found}; queries and passages need one width")
    for rank, (row, key) in enumerate(zip(rows, keys, strict=True)):
        if row >= 0:
            raise NotFinite(rank, row, num_queries[rank], key)
    if embedding_nD is None:
        embedding_nD = torch.empty(0, max(widest), dtype=_DTYPES[max(dtypes)], device=device)
    widest_spread = max(spreads) * SPREAD_UNIT if max(spreads) >= 0 else None
    return Agreed(embedding_nD, num_queries, num_passages, max(most_positives), max(halved), widest_spread)


def _spread(embedding_nD: Tensor, num_queries: int) -> int:
    """Return 1 - the mean cosine among queries or among passages, the larger of the two, in SPREAD_UNIT; -1 without pairs.

    Cost: n x D, by the sum of unit vectors.
    """
    unit_nD = torch.nn.functional.normalize(embedding_nD.detach().float(), dim=1)
    sides = [side for side in (unit_nD[:num_queries], unit_nD[num_queries:]) if len(side) > 1]
    cosines = [float(side.sum(0).square().sum() - len(side)) / (len(side) * (len(side) - 1)) for side in sides]
    return max((max(0, round((1 - cosine) / SPREAD_UNIT)) for cosine in cosines), default=-1)


def _first_not_finite(batch: Batch, embedding_nD: Tensor | None) -> tuple[int, int]:
    """Return (row, key) of the first embedding that is not finite; row -1 if all are."""
    if embedding_nD is None or bool(embedding_nD.isfinite().all()):
        return -1, 0
    row = int(embedding_nD.isfinite().all(1).logical_not().nonzero()[0])
    return row, int(batch.keys[row])
