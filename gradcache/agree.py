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
from gradcache.exchange import Counts, gather_integers
from gradcache.objectives.tile import Objective

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
    counts: Counts
    num_rows: list[int]  # queries and passages of each rank, columns or not
    num_halved: int  # chunks that did not fit into memory, the most on any rank
    spread: float | None  # 1 - the mean cosine among the embeddings of a side on a rank, the most of all; 0: all are one


def agree(
    batch: Batch,
    encoding: Encoding,
    objective: Objective,
    num_halved: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Agreed:
    """Return what the loss needs. Collective: one small all-gather.

    Raises on every rank alike: NotFinite; ValueError if no rank has a query, the embeddings have several widths, or a value that
    the objective needs is missing for a query.
    """
    embedding_nD = encoding.embedding_nD
    widths = encoding.widths or {0}
    dtype = -1 if embedding_nD is None else _DTYPES.index(embedding_nD.dtype)
    row, key = _first_not_finite(batch, embedding_nD)
    extra = 0 if batch.extra is None else len(batch.extra.keys)
    counts = [batch.num_queries, len(batch.shared), extra, len(batch.judged.values_m), len(batch.keys), num_halved]
    spread = -1 if embedding_nD is None or row >= 0 else _spread(embedding_nD, batch.num_queries)
    missing = _first_missing(batch, objective)
    every = gather_integers([*counts, min(widths), max(widths), dtype, row, key, spread, *missing], group, device)
    columns = [list(column) for column in zip(*every, strict=True)]
    (num_queries, num_shared, num_extra, num_positives, num_rows, halved), columns = columns[:6], columns[6:]
    narrowest, widest, dtypes, rows, keys, spreads, missing_names, missing_queries = columns
    if sum(num_queries) == 0:
        raise ValueError("the batch has no query on any rank; expected at least one")
    distinct = {*narrowest, *widest} - {0}
    if len(distinct) > 1:
        found = " and ".join(map(str, sorted(distinct)))
        raise ValueError(f"the towers return embeddings of widths {found}; queries and passages need one width")
    for rank, (row, key) in enumerate(zip(rows, keys, strict=True)):
        if row >= 0:
            raise NotFinite(rank, row, num_queries[rank], key)
    for rank, (number, query) in enumerate(zip(missing_names, missing_queries, strict=True)):
        if number >= 0:
            raise ValueError(
                f"{type(objective).__name__} needs a value {objective.cell_values[number]!r} of every scored pair, and query "
                f"{query} of rank {rank} has one without it"
            )
    if embedding_nD is None:
        embedding_nD = torch.empty(0, max(widest), dtype=_DTYPES[max(dtypes)], device=device)
    widest_spread = max(spreads) * SPREAD_UNIT if max(spreads) >= 0 else None
    counts_of_ranks = Counts(queries=num_queries, passages=num_shared, extra=num_extra, positives=num_positives)
    return Agreed(embedding_nD, counts_of_ranks, num_rows, max(halved), widest_spread)


def _first_missing(batch: Batch, objective: Objective) -> tuple[int, int]:
    """Return (which of the objective's `cell_values`, query) of the first pair that lacks one; -1 if all are there."""
    pairs = [] if batch.candidates is None else [(batch.candidates.query, batch.candidates.values)]
    if objective.wants_siblings:
        pairs.append((batch.positives.rows_m, batch.positive_values))
    for number, name in enumerate(objective.cell_values):
        for query, values in pairs:
            is_missing = values[name].isnan() if name in values else torch.ones(len(query), dtype=torch.bool)
            if bool(is_missing.any()):
                return number, int(query[is_missing][0])
    return -1, 0


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
    return row, int(batch.keys[row]) if row < len(batch.keys) else 0
