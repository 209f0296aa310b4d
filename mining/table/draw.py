"""A draw of negatives: its rules, and one rank's queries of a tile."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mining.ranks import Ranks
from mining.settings import FilterSettings, RerankSettings, SampleSettings
from mining.table.filters import Kept, Keys, OwnTexts, Positives, drop_by_score, margins_of
from mining.table.judgements import Judgements
from mining.table.rerank import Reranker, drop_by_cross_encoder
from trainer.handoff.margins import Margins
from trainer.handoff.negatives import Negatives

GoOn = Callable[[float], None]  # told which share of a tile's pairs is done


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

    @property
    def margins(self) -> Margins:
        return margins_of(self.filter, "off" if self.reranker is None else self.rerank.margin)


@dataclass
class Share:
    """One rank's queries of a tile, with their candidates, best first."""

    places: slice
    rows: np.ndarray  # (Q,) of queries.jsonl
    own: OwnTexts
    ids_QK: np.ndarray
    scores_QK: np.ndarray
    first_QK: np.ndarray  # score when first drawn, of those that the last version has; NaN, and inf for random ones
    teacher_QK: np.ndarray  # NaN where the cross-encoder was not asked
    positives: Positives
    positive_score_Q: np.ndarray | None  # of the positive that decides
    early_QK: np.ndarray  # which candidates filter.range_min takes for positives
    counts: dict[str, int] = field(default_factory=dict)


def ask_teacher(
    draw: Draw, ranks: Ranks, places: slice, query_n: np.ndarray, passage_rows: np.ndarray, go_on: GoOn
) -> np.ndarray:
    """Return the cross-encoder's score of some pairs, queries ascending. Collective: one's request to stop is everyone's."""
    reranker = draw.reranker
    assert reranker is not None
    return ranks.together(lambda: reranker.score(query_n + places.start, passage_rows, go_on))


def hold_to_scores(draw: Draw, share: Share, kept: Kept, scores_QK: np.ndarray) -> None:
    """Drop the candidates that a rule on the encoder's scores forbids."""
    drop_by_score(draw.filter, draw.margins, kept, scores_QK, share.positive_score_Q)


def hold_to_teacher(
    draw: Draw, ranks: Ranks, share: Share, kept: Kept, ids_QK: np.ndarray, scores_QK: np.ndarray, go_on: GoOn
) -> np.ndarray:
    """Drop the candidates that a rule on the cross-encoder's scores forbids; with filter.positive="each" also those that no
    positive admits.

    Returns the cross-encoder's scores of what was left before, (Q, K), NaN elsewhere. Collective where there is a cross-encoder.
    """
    teacher_QK = np.full(ids_QK.shape, np.nan, np.float32)
    if draw.reranker is not None:
        query_n, at_n = np.nonzero(kept.mask_QK)
        teacher_QK[query_n, at_n] = ask_teacher(draw, ranks, share.places, query_n, ids_QK[query_n, at_n], go_on)
        deciding_Q = share.positives.deciding(share.positives.teacher_scores, draw.filter.positive)
        assert deciding_Q is not None
        drop_by_cross_encoder(draw.rerank, kept, teacher_QK, deciding_Q)
    if draw.filter.positive == "each" and share.positives.scores is not None:
        kept.narrow("each_positive", share.positives.any_admits(draw.margins, scores_QK, teacher_QK))
    return teacher_QK
