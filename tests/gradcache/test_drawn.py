"""Steps over drawn batches and settings against the oracle, in float64 and with ranks as threads: what nobody thought of."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcache import Batch, Candidates, Extra, LossOptions, Objective, Ragged, TextTerm, Tower
from gradcache.objectives import (
    CACR,
    AdaptiveMargins,
    AlignmentUniformity,
    InfoNCE,
    Sigmoid,
)
from gradcache.testing.found import by_oracle, by_steps
from gradcache.testing.made_up import MadeUp
from tests.gradcache.test_testing import Distilled, Guided, LearnedMargin, LogitsAndScores, WholeBatch

NUM_DRAWS = 80
WIDTH, OTHER_WIDTH = 6, 4
PASSAGES, EXTRA = 100, 300  # first keys


def several_positives():
    return InfoNCE(positives="mean")


class GradedSiblings(InfoNCE):
    """Scores of all positives follow their grades."""

    cell_values = ("grade",)

    def loss(self, rows):
        grade_c = rows.cells.values["grade"]
        error_c = rows.cells.score_c - torch.where(grade_c.isnan(), 0.5, grade_c)  # a passage's queries have none
        return super().loss(rows) + rows.sum_cells(error_c.square())


OBJECTIVES = [InfoNCE, several_positives, lambda: GradedSiblings(positives="mean"), LearnedMargin, LogitsAndScores, Distilled]
OBJECTIVES += [Guided, WholeBatch, AlignmentUniformity, lambda: InfoNCE(hardest=3), CACR, AdaptiveMargins]
OBJECTIVES += [lambda: Sigmoid(bias=-1.0)]


def near_a_number(embedding, keys):
    return (embedding - keys[:, None].to(embedding).sin()).square().mean(1)


@dataclass
class Drawn:
    """What all ranks of a case have in common."""

    draw: random.Random
    generator: torch.Generator
    objective: Objective
    outputs: dict[str, int] | None
    has_candidates: bool
    has_own_only: bool
    has_extra: bool
    frozen: int | None  # side whose tower is frozen
    unit: Tensor  # embeddings of all texts
    positives: list[list[int]]  # of each query text

    def values(self, names, count: int) -> dict[str, Tensor]:
        return {name: 0.5 + torch.rand(count, generator=self.generator) for name in names}

    def batch(self, rank: int, num_queries: int) -> tuple[Batch, Tensor]:
        """Return a rank's batch and the embeddings of its rows."""
        draw, num_texts = self.draw, len(self.positives)
        num_passages = num_queries * draw.choice([1, 2, 4]) + draw.choice([0, 2])
        query = torch.randint(num_texts, (num_queries,), generator=self.generator)
        passage = PASSAGES + torch.randint(num_texts, (num_passages,), generator=self.generator)
        keys = torch.cat([query, passage])
        leaf = self.unit[keys].requires_grad_()
        lists = [self.positives[text] for text in query.tolist()]
        num_positives, candidates, extra = sum(map(len, lists)), None, None
        if self.has_candidates:
            rows = sorted(draw.randrange(num_queries) for _ in range(draw.randrange(4))) if num_queries else []
            candidates = Candidates(
                query=torch.tensor(rows, dtype=torch.int64),
                passage=torch.randint(num_passages or 1, (len(rows),), generator=self.generator),
                values=self.values(self.objective.cell_values, len(rows)),
            )
        if self.has_extra:
            extra_keys = torch.tensor([EXTRA + rank, PASSAGES, EXTRA, PASSAGES + 1][: draw.choice([0, 2, 4])], dtype=torch.int64)
            extra = Extra(embedding_xD=self.unit[extra_keys], keys=extra_keys)
        batch = Batch(
            towers=self._towers(leaf, num_queries),
            num_queries=num_queries,
            keys=keys,
            target=torch.randint(num_passages or 1, (num_queries,), generator=self.generator),
            positive_keys=Ragged(
                torch.tensor([key for own in lists for key in own], dtype=torch.int64),
                torch.tensor([len(own) for own in lists], dtype=torch.int64),
            ),
            positive_values=self.values(self.objective.cell_values, num_positives),
            query_values=self.values(["weight", "margin"], num_queries),
            candidates=candidates,
            own_only=torch.rand(num_passages, generator=self.generator) < 0.3 if self.has_own_only else None,
            extra=extra,
            outputs=self.outputs,
        )
        return batch, leaf

    def _towers(self, leaf: Tensor, num_queries: int) -> list[Tower]:
        def tower(first: int, count: int, is_frozen: bool) -> Tower:
            ones = torch.ones(count, dtype=torch.int64)
            return Tower(encode=lambda rows: leaf[rows], lengths=ones, load=lambda rows: rows + first, is_frozen=is_frozen)

        if self.frozen is None:
            return [tower(0, len(leaf), False)]
        counts = (num_queries, len(leaf) - num_queries)
        return [tower(side * num_queries, counts[side], self.frozen == side) for side in range(2)]


def drawn_case(seed: int) -> tuple[MadeUp, LossOptions, int | None]:
    """Return batches of 1 to 4 ranks, a loss, and the side that is frozen."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    objective = draw.choice(OBJECTIVES)()
    if isinstance(objective, nn.Module):
        objective.double()
    second = objective.second if objective.second not in (None, "positive") else draw.choice([None, None, "other"])
    outputs = None if second is None else {"embedding": WIDTH, second: OTHER_WIDTH}
    num_texts = draw.choice([3, 8, 30])
    unit = torch.randn(2 * EXTRA, WIDTH + (OTHER_WIDTH if outputs else 0), generator=generator, dtype=torch.float64)
    drawn = Drawn(
        draw=draw,
        generator=generator,
        objective=objective,
        outputs=outputs,
        has_candidates=draw.random() < 0.6,
        has_own_only=draw.random() < 0.4,
        has_extra=draw.random() < 0.3,
        frozen=draw.choice([None, None, 0, 1]),
        unit=unit / unit.norm(dim=1, keepdim=True),
        positives=[
            sorted({PASSAGES + draw.randrange(num_texts) for _ in range(draw.choice([0, 1, 2, 5]))}) for _ in range(num_texts)
        ],
    )
    rows = [draw.choice([0, 1, 2, 3, 5]) for _ in range(draw.choice([1, 2, 2, 3, 3, 4]))]
    rows[draw.randrange(len(rows))] += 1
    batches, embedded = zip(*(drawn.batch(rank, count) for rank, count in enumerate(rows)), strict=True)
    widths = draw.choice([None, None, (4, 2), (3,)])
    options: dict[str, Any] = {
        "symmetric": draw.random() < 0.6,
        "same_side": draw.random() < 0.5,
        "gather": draw.choice(["queries", "auto"] if drawn.has_extra and len(rows) > 1 else ["passages", "queries", "auto"]),
        "keep_scores_gib": draw.choice([None, 0.0, 1e-7]),
        "tile_rows": draw.choice([None, 1, 2, 3]),
        "widths": widths,
        "width_weights": None if widths is None or draw.random() < 0.5 else tuple(draw.uniform(0.1, 1) for _ in widths),
        "outputs": {"embedding": 1.0, "other": 2.0} if second == "other" and draw.random() < 0.5 else None,
        "text_terms": (TextTerm(function=near_a_number, weight=0.5),) if draw.random() < 0.2 else (),
    }
    return MadeUp(list(batches), list(embedded)), LossOptions(objective=objective, **options), drawn.frozen


def without_frozen(gradient: Tensor, made: MadeUp, frozen: int | None) -> Tensor:
    """Return the oracle's gradient of the embeddings with zeros where a tower is frozen."""
    if frozen is None:
        return gradient
    is_query = torch.cat([torch.arange(len(batch.keys)) < batch.num_queries for batch in made.batches])
    return (gradient.view(len(is_query), -1) * (is_query == bool(frozen))[:, None]).flatten()


@pytest.mark.parametrize("first", range(0, NUM_DRAWS, 10))
def test_steps_are_the_oracles_whatever_is_drawn(first):
    num_moved = 0
    for seed in range(first, first + 10):
        made, options, frozen = drawn_case(seed)
        wanted = by_oracle(made, options, options.objective)
        assert wanted.loss.isfinite(), seed
        num_moved += bool(wanted.gradients["the embeddings"].any())
        wanted.gradients["the embeddings"] = without_frozen(wanted.gradients["the embeddings"], made, frozen)
        for found in by_steps(made, options):
            words = found.difference(wanted)
            assert words is None, f"seed {seed}, {[batch.num_queries for batch in made.batches]} queries, {options}: {words}"
    assert num_moved >= 8, "a few have neither negatives nor candidates"
