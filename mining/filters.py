"""Which candidates may become negatives: pure functions of a table of candidates, one mask each, each counted.

A row of the table holds one query's candidates, best first; -1 marks an empty place. Every filter sees what the earlier
ones kept, so the counters add up to what was dropped.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """Section `filter`. Judged positives, of any split, are always dropped."""

    equal_texts: bool = True  # drop texts equal to a positive or to the query itself
    duplicates: bool = True  # of several candidates with one text keep the first
    # keep s < s_pos - |s_pos| * margin, s_pos the query's best positive (NV-Retriever's TopK-PercPos, sign-safe)
    relative_margin: float | Literal["off"] = 0.05
    absolute_margin: float | Literal["off"] = "off"  # keep s < s_pos - margin (NV-Retriever's TopK-MarginPos)

    def __post_init__(self) -> None:
        for name in ("relative_margin", "absolute_margin"):
            value = getattr(self, name)
            if value != "off" and not value >= 0:
                raise InputError(f'filter.{name}={value} is negative; expected 0 or more, or "off"')


@dataclass(frozen=True)
class OwnTexts:
    """What belongs to each of Q queries, so it is no negative of theirs: two tables in CSR form."""

    judged_indptr: np.ndarray  # (Q + 1,) int64
    judged_rows: np.ndarray  # corpus rows judged relevant in any split
    key_indptr: np.ndarray  # (Q + 1,) int64
    keys: np.ndarray  # content keys of those texts and of the query


def filter_candidates(
    settings: FilterSettings,
    ids_QK: np.ndarray,
    scores_QK: np.ndarray,
    key_QK: np.ndarray,
    own: OwnTexts,
    positive_score_Q: np.ndarray | None,
) -> tuple[np.ndarray, dict[str, int]]:
    """Return the mask of what may be a negative, (Q, K) bool, and how many each filter dropped.

    key_QK: content key of each candidate; anything where the id is -1.
    positive_score_Q: score of each query's best positive; None: no scores to compare with (BM25), no margins.
    """
    keep = ids_QK >= 0
    dropped: dict[str, int] = {}

    def narrow(name: str, allowed: np.ndarray) -> None:
        nonlocal keep
        dropped[name] = int((keep & ~allowed).sum())
        keep = keep & allowed

    narrow("judged", ~is_listed(ids_QK, own.judged_indptr, own.judged_rows))
    if settings.equal_texts:
        narrow("equal_texts", ~is_listed(key_QK, own.key_indptr, own.keys))
    if settings.duplicates:
        narrow("duplicates", is_first_of_its_key(key_QK, keep))
    if positive_score_Q is not None:
        if settings.relative_margin != "off":
            narrow("relative_margin", scores_QK < relative_ceiling(positive_score_Q, settings.relative_margin)[:, None])
        if settings.absolute_margin != "off":
            narrow("absolute_margin", scores_QK < (positive_score_Q - np.float32(settings.absolute_margin))[:, None])
    return keep, dropped


def is_listed(value_QK: np.ndarray, indptr: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Tell for each value, (Q, K), whether its row's list in the CSR table (indptr, listed) has it."""
    distinct = np.unique(listed)
    if len(distinct) == 0:
        return np.zeros(value_QK.shape, bool)
    place_QK = np.minimum(np.searchsorted(distinct, value_QK), len(distinct) - 1)
    # A pair (row, value) is one number, so that one sorted search answers for all rows.
    row_of_listed = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    pairs = row_of_listed * len(distinct) + np.searchsorted(distinct, listed)
    pair_QK = np.arange(len(value_QK))[:, None] * len(distinct) + place_QK
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


def relative_ceiling(positive_score_Q: np.ndarray, margin: float) -> np.ndarray:
    """Return the score below which a candidate is taken for a true negative; never above s_pos, whatever its sign."""
    return positive_score_Q - np.abs(positive_score_Q) * np.float32(margin)
