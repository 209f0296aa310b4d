"""Small batches with everything a loss may meet, for proofs: repeated texts, several positives, values, ranks without rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcache.batch import Batch, Candidates, Extra, Tower
from gradcache.objectives.tile import Objective
from gradcache.ragged import Ragged

# n rows of a rank, B queries of it, D width

WIDTH, SECOND_WIDTH = 5, 3
QUERY_TEXTS, PASSAGE_TEXTS = 5, 8  # fewer than rows, so that texts repeat
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
    width = WIDTH + (SECOND_WIDTH if _second_output(objective) else 0)
    of_text = torch.randn(2 * FIRST_EXTRA, width, generator=generator, dtype=torch.float64)
    batches, embedded = [], []
    for rank, num_queries in enumerate(rows):
        query = (3 * rank + 2 * torch.arange(num_queries)) % QUERY_TEXTS
        keys = torch.cat([query, FIRST_PASSAGE + query, FIRST_PASSAGE + (query + 5) % PASSAGE_TEXTS])  # positive, hard negative
        leaf = torch.nn.functional.normalize(of_text[keys], dim=1).requires_grad_()
        embedded.append(leaf)
        batches.append(_batch(objective, leaf, keys, num_queries, query_values, has_extra, all_related, of_text, rank, generator))
    return MadeUp(batches, embedded)


def _batch(objective, leaf, keys, num_queries, query_values, has_extra, all_related, of_text, rank, generator) -> Batch:
    def draw(count: int) -> Tensor:
        return 0.5 + torch.rand(count, generator=generator)

    query = keys[:num_queries]
    if all_related:
        positives = Ragged.of_table((FIRST_PASSAGE + torch.arange(PASSAGE_TEXTS)).repeat(num_queries, 1))
    else:  # one, two or three, as the text has it
        counts = 1 + query % 3
        steps = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        positives = Ragged(FIRST_PASSAGE + (query.repeat_interleave(counts) + 3 * steps) % PASSAGE_TEXTS, counts)
    num_cells = 2 * num_queries
    own_only = torch.zeros(2 * num_queries, dtype=torch.bool)
    own_only[-1:] = has_extra
    extra_keys = torch.tensor([FIRST_EXTRA + rank, FIRST_PASSAGE + rank, FIRST_EXTRA])
    extra_xD = torch.nn.functional.normalize(of_text[extra_keys], dim=1)
    return Batch(
        towers=[Tower(encode=lambda rows: leaf[rows], lengths=torch.ones(len(keys), dtype=torch.int64), load=lambda rows: rows)],
        num_queries=num_queries,
        keys=keys,
        target=torch.arange(num_queries),
        positive_keys=positives,
        positive_values={name: draw(len(positives.values_m)) for name in objective.cell_values},
        query_values={name: draw(num_queries) for name in ("weight", *query_values)},
        candidates=Candidates(
            query=torch.arange(num_queries).repeat_interleave(2),
            passage=torch.arange(num_cells).view(2, -1).T.flatten(),  # its positive and its hard negative
            values={name: draw(num_cells) for name in objective.cell_values},
        ),
        own_only=own_only if has_extra else None,
        extra=Extra(embedding_xD=extra_xD, keys=extra_keys) if has_extra else None,
        outputs={"embedding": WIDTH, objective.second: SECOND_WIDTH} if _second_output(objective) else None,
    )


def _second_output(objective: Objective) -> bool:
    return objective.second not in (None, "positive")
