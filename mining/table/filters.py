"""Which candidates may become negatives: pure functions of a table of candidates, one mask each, each counted.

A row of the table holds one query's candidates, best first; -1 marks an empty place. Every filter sees what the earlier
ones kept, so the counters add up to what was dropped. Filters on what is known come first (judged, an equal text, a
duplicate). The rules on ranks and scores follow; they guess which of the rest are positives that nobody has judged.
"""

from dataclasses import dataclass

import numpy as np

from mining.settings import FilterSettings
from trainer.handoff.margins import Margins
from trainer.handoff.settings import Margin, Which

KNOWN = ("judged", "equal_texts", "duplicates")  # dropped for what is known of them, not for a guess


def margins_of(settings: FilterSettings, teacher_margin: Margin = "off") -> Margins:
    """Return the margins that hold; teacher_margin: rerank.margin."""
    return Margins(
        positive=settings.positive,
        relative_margin=settings.relative_margin,
        absolute_margin=settings.absolute_margin,
        adaptive_margin=settings.adaptive_margin,
        teacher_margin=teacher_margin,
    )


@dataclass(frozen=True)
class Keys:
    """One way in which texts are equal: as they are, or as the tokens that the encoder reads. Equal keys, equal texts."""

    query_Q: np.ndarray  # (Q,) int64
    passage_N: np.ndarray  # (N,) int64, of the whole corpus


@dataclass(frozen=True)
class OwnTexts:
    """The passages that belong to each of Q queries, and so are no negatives of it. Queries with one text share a list; there
    are L lists.
    """

    list_of_Q: np.ndarray  # (Q,) int64
    indptr: np.ndarray  # (L + 1,) int64
    rows: np.ndarray  # corpus rows judged relevant, in any split, to any query of the text, or with the id of such a query
    keys: tuple[Keys, ...]  # of these queries; every way counts


@dataclass(frozen=True)
class Positives:
    """The scores of the positives of Q queries, in CSR form, at least one a query; None: unknown, as for BM25."""

    indptr: np.ndarray  # (Q + 1,) int64
    scores: np.ndarray | None  # (p,) float32
    teacher_scores: np.ndarray | None = None  # (p,) float32, a cross-encoder's

    def deciding(self, scores: np.ndarray | None, which: Which) -> np.ndarray | None:
        """Return the score of the positive that decides for each query, (Q,): of several the lowest, or else the best."""
        if scores is None:
            return None
        return (np.minimum if which == "lowest" else np.maximum).reduceat(scores, self.indptr[:-1])

    def any_admits(self, margins: Margins, scores_QK: np.ndarray, teacher_QK: np.ndarray) -> np.ndarray:
        """Tell which candidates are below all margins of at least one positive of their query, (Q, K) bool."""
        assert self.scores is not None
        admitted_QK = np.zeros(scores_QK.shape, bool)
        count_Q = np.diff(self.indptr)
        for place in range(count_Q.max(initial=0)):
            rows = np.flatnonzero(count_Q > place)  # so the work follows the number of positives
            at = self.indptr[rows] + place
            teacher = (None, None) if self.teacher_scores is None else (teacher_QK[rows], self.teacher_scores[at][:, None])
            admitted_QK[rows] |= margins.admit(scores_QK[rows], self.scores[at][:, None], *teacher)
        return admitted_QK


class Kept:
    """Which candidates are left, and how many each filter dropped."""

    def __init__(self, ids_QK: np.ndarray):
        self.mask_QK = ids_QK >= 0
        self.dropped: dict[str, int] = {}

    def narrow(self, name: str, allowed_QK: np.ndarray) -> None:
        """Keep what is allowed and count what is not under a name."""
        self.dropped[name] = self.dropped.get(name, 0) + int((self.mask_QK & ~allowed_QK).sum())
        self.mask_QK = self.mask_QK & allowed_QK

    def empty(self) -> np.ndarray:
        """Return which queries have nothing left, (Q,) bool."""
        return np.logical_not(self.mask_QK.any(axis=1))


def drop_known(settings: FilterSettings, kept: Kept, ids_QK: np.ndarray, own: OwnTexts) -> None:
    """Drop what is known to be no negative of its query: judged, with the text of the query or a positive, or a repeat."""
    kept.narrow("judged", ~is_listed(ids_QK, own.indptr, own.rows, own.list_of_Q))
    for keys in own.keys if settings.equal_texts else ():
        key_QK = keys.passage_N[ids_QK]
        is_own_QK = is_listed(key_QK, own.indptr, keys.passage_N[own.rows], own.list_of_Q)
        kept.narrow("equal_texts", ~is_own_QK & (key_QK != keys.query_Q[:, None]))
    for keys in own.keys if settings.duplicates else ():
        kept.narrow("duplicates", is_first_of_its_key(keys.passage_N[ids_QK], kept.mask_QK))


def drop_by_rank(settings: FilterSettings, kept: Kept) -> None:
    """Drop candidates by their place among those left: the first ones, which may be positives, and those too far away to teach
    anything.
    """
    if settings.range_min or settings.range_max != "off":
        place_QK = kept.mask_QK.cumsum(1) - 1
        last = place_QK.shape[1] if settings.range_max == "off" else settings.range_max
        kept.narrow("range", (place_QK >= settings.range_min) & (place_QK < last))


def drop_by_score(
    settings: FilterSettings, margins: Margins, kept: Kept, scores_QK: np.ndarray, positive_score_Q: np.ndarray | None
) -> None:
    """Drop candidates that score as high as a positive, or too low.

    positive_score_Q: score of the positive that decides for each query; None: no scores to compare with (BM25), and no rules.
    """
    if positive_score_Q is None:
        return
    if settings.max_score != "off":
        kept.narrow("max_score", scores_QK < np.float32(settings.max_score))
    if settings.min_score != "off":
        kept.narrow("min_score", scores_QK >= np.float32(settings.min_score))
    for name, ceiling_Q in margins.ceilings(positive_score_Q):
        kept.narrow(name, scores_QK < ceiling_Q[:, None])


def is_listed(value_QK: np.ndarray, indptr: np.ndarray, listed: np.ndarray, list_of_Q: np.ndarray | None = None) -> np.ndarray:
    """Tell for each value, (Q, K), whether its row's list in the CSR table (indptr, listed) has it.

    list_of_Q: which list each row has; None: its own, in order.
    """
    distinct = np.unique(listed)
    if len(distinct) == 0:
        return np.zeros(value_QK.shape, bool)
    place_QK = np.minimum(np.searchsorted(distinct, value_QK), len(distinct) - 1)
    # A pair (row, value) is one number, so that one sorted search answers for all rows.
    row_of_listed = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    pairs = row_of_listed * len(distinct) + np.searchsorted(distinct, listed)
    list_of_Q = np.arange(len(value_QK)) if list_of_Q is None else list_of_Q
    pair_QK = list_of_Q[:, None] * len(distinct) + place_QK
    return (distinct[place_QK] == value_QK) & np.isin(pair_QK, pairs)


def is_first_of_its_key(key_QK: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Tell for each kept place whether no earlier kept one of its row has the same key; true where not kept."""
    # Kept places first, then by key, then by place: equal keys stand side by side, the best one first.
    order = np.lexsort((key_QK, ~keep), axis=1)
    sorted_key, sorted_keep = np.take_along_axis(key_QK, order, 1), np.take_along_axis(keep, order, 1)
    repeats = np.zeros(key_QK.shape, bool)
    repeats[:, 1:] = (sorted_key[:, 1:] == sorted_key[:, :-1]) & sorted_keep[:, 1:]
    is_first = np.empty(key_QK.shape, bool)
    np.put_along_axis(is_first, order, ~repeats, 1)
    return is_first
