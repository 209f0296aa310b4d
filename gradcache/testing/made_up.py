"""Small batches with everything a loss may meet, for proofs: repeated texts, several positives, values, ranks without rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcache.batch import Batch, Candidates, Extra, Tower
from gradcache.objectives.tile import Objective
from gradcache.ragged import Ragged

# n rows of a rank, B queries of it, D width

WIDTH, SECOND_WIDTH = 6, 3
QUERY_TEXTS, PASSAGE_TEXTS = 5, 10  # fewer than rows, so that texts repeat
FIRST_PASSAGE, FIRST_EXTRA = 100, 200  # keys


@dataclass(frozen=True)
class MadeUp:
    """The batches of some ranks, and the embeddings that their towers return, float64 leaves."""

    batches: list[Batch]
    embedded: list[Tensor]  # (n, D) of each rank


def make_up(
    objective: Objective, rows: Sequence[int], query_values: Sequence[str], *, has_extra: bool = False, all_related: bool = False
) -> MadeUp:
    """Return batches of so many queries on each rank, with all that the objective asks for.

    has_extra: whether ranks have columns of their own, and passages that are none. all_related: every passage is a positive of
    every query, so that no row has a negative.
    """
    generator = torch.Generator().manual_seed(len(rows) + sum(rows))

    def values(names: Sequence[str], count: int) -> dict[str, Tensor]:
        return {name: 0.5 + torch.rand(count, generator=generator) for name in names}

    width = WIDTH + (SECOND_WIDTH if _second_output(objective) else 0)
    unit = torch.randn(2 * FIRST_EXTRA, width, generator=generator, dtype=torch.float64)
    unit /= unit.norm(dim=1, keepdim=True)
    batches, embedded = [], []
    for rank, num_queries in enumerate(rows):
        query = (3 * rank + 2 * torch.arange(num_queries)) % QUERY_TEXTS
        keys = torch.cat([query, FIRST_PASSAGE + query, FIRST_PASSAGE + (query + 5) % PASSAGE_TEXTS])  # positive, hard negative
        embedded.append(unit[keys].requires_grad_())
        every = Ragged.of_table((FIRST_PASSAGE + torch.arange(PASSAGE_TEXTS)).repeat(num_queries, 1))
        positives = every if all_related else _positives(query)
        extra_keys = torch.tensor([FIRST_EXTRA + rank, FIRST_PASSAGE + rank, FIRST_EXTRA])
        number = torch.arange(num_queries)
        batches.append(
            Batch(
                towers=[_tower(embedded[-1])],
                num_queries=num_queries,
                keys=keys,
                target=number,
                positive_keys=positives,
                positive_values=values(objective.cell_values, len(positives.values_m)),
                query_values=values(("weight", *query_values), num_queries),
                candidates=_candidates(objective, number, values),
                own_only=(torch.arange(2 * num_queries) == 2 * num_queries - 1) if has_extra else None,
                extra=Extra(embedding_xD=unit[extra_keys], keys=extra_keys) if has_extra else None,
                outputs={"embedding": WIDTH, str(objective.second): SECOND_WIDTH} if _second_output(objective) else None,
            )
        )
    return MadeUp(batches, embedded)


def _candidates(objective: Objective, number: Tensor, values: Callable[[Sequence[str], int], dict[str, Tensor]]) -> Candidates:
    """Return the positive and the hard negative of each query, or the negative alone where it is to be a cell and no column."""
    negative = len(number) + number
    if objective.wants_own_negatives:
        return Candidates(query=number, passage=negative, values=values(objective.cell_values, len(number)), are_columns=False)
    return Candidates(
        query=number.repeat_interleave(2),
        passage=torch.stack([number, negative], 1).flatten(),
        values=values(objective.cell_values, 2 * len(number)),
    )


def _tower(leaf_nD: Tensor) -> Tower:
    """Return one that has the embeddings already."""
    return Tower(encode=lambda rows: leaf_nD[rows], lengths=torch.ones(len(leaf_nD), dtype=torch.int64), load=lambda rows: rows)


def _positives(query: Tensor) -> Ragged:
    """Return the keys of one to four positives, as the query's text has them; some stand on several ranks."""
    counts = 1 + (query + 1) % 4
    number = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return Ragged(FIRST_PASSAGE + (query.repeat_interleave(counts) + 3 * number) % PASSAGE_TEXTS, counts)


def _second_output(objective: Objective) -> bool:
    return objective.second not in (None, "positive")
