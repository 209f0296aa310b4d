"""The rules of a draw of negatives, and one rank's queries of a tile with what they are held to."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mining.ranks import Ranks
from mining.settings import FilterSettings, RerankSettings, SampleSettings
from mining.table.filters import Kept, Keys, OwnTexts, Positives, drop_by_score, margins_of, places_of
from mining.table.judgements import Judgements
from mining.table.rerank import Reranker, drop_by_cross_encoder
from trainer.handoff.margins import Margins
from trainer.handoff.negatives import Negatives

GoOn = Callable[[float], None]  # told which share of a tile's pairs is done
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Draw:
    """The rules by which negatives are drawn, and the queries that get them."""

    filter: FilterSettings
    sample: SampleSettings
    rerank: RerankSettings
    seed: int
    version: int
    judgements: Judgements
    keys: tuple[Keys, ...]  # of all training queries and passages
    reranker: Reranker | None = None
    last: Negatives | None = None  # whose negatives stay until they are easy; None: none do
    device: torch.device = CPU  # where candidates are filtered and sampled

    @property
    def margins(self) -> Margins:
        return margins_of(self.filter, "off" if self.reranker is None else self.rerank.margin)


@dataclass(frozen=True)
class Asking:
    """Queries that get negatives, and what these are held to."""

    places: np.ndarray  # (Q,) int64 among the training queries
    rows: np.ndarray  # (Q,) of queries.jsonl
    own: OwnTexts
    positives: Positives
    positive_score_Q: np.ndarray | None  # of the positive that decides

    def some(self, at: np.ndarray) -> "Asking":
        """Return some of them."""
        deciding_Q = None if self.positive_score_Q is None else self.positive_score_Q[at]
        return Asking(self.places[at], self.rows[at], self.own.some(at), self.positives.some(at), deciding_Q)


@dataclass
class Share:
    """One rank's queries of a tile, with their candidates, best first."""

    places: slice
    asking: Asking
    ids_QK: Tensor  # int64
    scores_QK: Tensor  # float32
    first_QK: Tensor | None  # score when first drawn, of those that the last version has; NaN, and inf for random ones
    teacher_QK: Tensor | None = None  # a cross-encoder's scores; NaN where it was not asked
    # (query, corpus row) of the candidates that filter.range_min takes for positives
    early: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    counts: dict[str, int] = field(default_factory=dict)


def ask_teacher(draw: Draw, ranks: Ranks, query_places: np.ndarray, passage_rows: np.ndarray, go_on: GoOn) -> np.ndarray:
    """Return the cross-encoder's score of some pairs, queries ascending. Collective: one's request to stop is everyone's."""
    reranker = draw.reranker
    assert reranker is not None
    return ranks.together(lambda: reranker.score(query_places, passage_rows, go_on))


def hold_to_scores(draw: Draw, asking: Asking, kept: Kept, scores_QK: Tensor) -> None:
    """Drop the candidates that a rule on the encoder's scores forbids."""
    drop_by_score(draw.filter, draw.margins, kept, scores_QK, asking.positive_score_Q)


def hold_to_teacher(
    draw: Draw, ranks: Ranks, asking: Asking, kept: Kept, ids_QK: Tensor, scores_QK: Tensor, go_on: GoOn
) -> Tensor | None:
    """Drop the candidates that a rule on the cross-encoder's scores forbids; with filter.positive="each" also those that no
    positive admits.

    Returns the cross-encoder's scores of what was left before, (Q, K), NaN elsewhere. Collective where there is a cross-encoder.
    """
    teacher_QK = None
    if draw.reranker is not None:
        query_n, at_n = rows_and_places(kept.mask_QK)
        found_n = ask_teacher(draw, ranks, asking.places[query_n], ids_QK.flatten()[at_n].cpu().numpy(), go_on)
        teacher_QK = torch.full_like(scores_QK, torch.nan)
        teacher_QK.view(-1)[at_n] = torch.from_numpy(found_n).to(teacher_QK.device)
        deciding_Q = asking.positives.deciding(asking.positives.teacher_scores, draw.filter.positive)
        assert deciding_Q is not None
        drop_by_cross_encoder(draw.rerank, kept, teacher_QK, deciding_Q)
    if draw.filter.positive == "each" and asking.positives.scores is not None:
        kept.narrow("each_positive", asking.positives.any_admits(draw.margins, scores_QK, teacher_QK))
    return teacher_QK


def rows_and_places(is_so_QK: Tensor) -> tuple[np.ndarray, Tensor]:
    """Return of what is so the rows, on the host, and the places in the table read row by row."""
    at_n = places_of(is_so_QK)
    return at_n.cpu().numpy() // max(1, is_so_QK.shape[1]), at_n
