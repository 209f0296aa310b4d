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
from gradcache.transfers import upload

SPREAD_UNIT = 1e-9  # of what travels as a whole number
NUM_AGREED = 15  # numbers that a rank tells
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
    """Return what the loss needs. Waits for the device once. Collective: one small all-gather.

    Raises on every rank alike: NotFinite; ValueError if no rank has a query, the embeddings have several widths, or a value that
    the objective needs is missing for a query.
    """
    embedding_nD = encoding.embedding_nD
    widths = encoding.widths or {0}
    dtype = -1 if embedding_nD is None else _DTYPES.index(embedding_nD.dtype)
    extra = 0 if batch.extra is None else len(batch.extra.keys)
    num_keys = [len(batch.judged.values_m), len(batch.hidden.values_m)]
    counts = [batch.num_queries, len(batch.shared), extra, *num_keys, len(batch.keys), num_halved]
    known = torch.tensor([*counts, min(widths), max(widths), dtype, *_first_missing(batch, objective)])
    found = torch.tensor([-1, 0, -1]) if embedding_nD is None else _found(batch, embedding_nD)
    assert len(known) + len(found) == NUM_AGREED
    every = gather_integers(torch.cat([upload(known, device), upload(found, device)]), group)
    columns = [list(column) for column in zip(*every, strict=True)]
    (num_queries, num_shared, num_extra, num_positives, num_hidden, num_rows, halved), columns = columns[:7], columns[7:]
    narrowest, widest, dtypes, missing_names, missing_queries, rows, keys, spreads = columns
    if sum(num_queries) == 0:
        raise ValueError("the batch has no query on any rank; expected at least one")
    distinct = {*narrowest, *widest} - {0}
    if len(distinct) > 1:
        words = " and ".join(map(str, sorted(distinct)))
        raise ValueError(f"the towers return embeddings of widths {words}; queries and passages need one width")
    for rank, (row, key) in enumerate(zip(rows, keys, strict=True)):
        if row >= 0:
            raise NotFinite(rank, row, num_queries[rank], key)
    for rank, (number, query) in enumerate(zip(missing_names, missing_queries, strict=True)):
        if number >= 0:
            name = [*objective.cell_values, *objective.row_values][number]
            whose = "every scored pair" if number < len(objective.cell_values) else "every query"
            what = "has one without it" if number < len(objective.cell_values) else "has none"
            raise ValueError(
                f"{type(objective).__name__} needs a value {name!r} of {whose}, and query {query} of rank {rank} {what}"
            )
    if embedding_nD is None:
        embedding_nD = torch.empty(0, max(widest), dtype=_DTYPES[max(dtypes)], device=device)
    widest_spread = max(spreads) * SPREAD_UNIT if max(spreads) >= 0 else None
    counts_of_ranks = Counts(
        queries=num_queries, passages=num_shared, extra=num_extra, positives=num_positives, hidden=num_hidden
    )
    return Agreed(embedding_nD, counts_of_ranks, num_rows, max(halved), widest_spread)


def _first_missing(batch: Batch, objective: Objective) -> tuple[int, int]:
    """Return (which of the objective's `cell_values`, query) of the first pair that lacks one; -1 if all are there."""
    pairs = [] if batch.candidates is None else [(batch.candidates.query, batch.candidates.values)]
    if objective.wants_siblings:
        pairs.append((batch.positives.rows_m, batch.positive_values))
    of_rows = torch.arange(batch.num_queries)
    for number, name in enumerate(objective.row_values, start=len(objective.cell_values)):
        known = batch.query_values.get(name)
        is_missing = torch.ones(len(of_rows), dtype=torch.bool) if known is None else known.isnan().cpu()
        if bool(is_missing.any()):
            return number, int(of_rows[is_missing][0])
    for number, name in enumerate(objective.cell_values):
        for query, values in pairs:
            is_missing = values[name].isnan() if name in values else torch.ones(len(query), dtype=torch.bool)
            if bool(is_missing.any()):
                return number, int(query[is_missing][0])
    return -1, 0


def _found(batch: Batch, embedding_nD: Tensor) -> Tensor:
    """Return the row and the key of the first embedding that is not finite, -1 and 0 if all are; and the spread, in SPREAD_UNIT.

    It is -1 where no side has a pair, or an embedding is broken. The numbers stay on the device.
    """
    is_finite_n = embedding_nD.isfinite().all(1)
    is_whole, row = is_finite_n.all(), is_finite_n.to(torch.int8).argmin()
    keys_n = upload(batch.keys, row.device)  # where the batch is derived, there may be fewer of them than rows
    key = torch.where(row < len(keys_n), keys_n[row.clamp(max=len(keys_n) - 1)], 0) if len(keys_n) else torch.zeros_like(row)
    spread = torch.where(is_whole, _spread(embedding_nD, batch.num_queries).nan_to_num(-1.0), -1).to(torch.int64)
    return torch.stack([torch.where(is_whole, -1, row), torch.where(is_whole, 0, key), spread])


def _spread(embedding_nD: Tensor, num_queries: int) -> Tensor:
    """Return 1 - the mean cosine among queries or among passages, the larger of the two, in SPREAD_UNIT; -1 without pairs.

    Cost: n x D, by the sum of unit vectors.
    """
    unit_nD = torch.nn.functional.normalize(embedding_nD.detach().float(), dim=1)
    found = [unit_nD.new_full((), -1.0, dtype=torch.float64)]
    for side in (unit_nD[:num_queries], unit_nD[num_queries:]):
        if len(side) > 1:
            cosine = (side.sum(0).square().sum() - len(side)).double() / (len(side) * (len(side) - 1))
            found.append(((1 - cosine) / SPREAD_UNIT).round().clamp(min=0))
    return torch.stack(found).amax()
