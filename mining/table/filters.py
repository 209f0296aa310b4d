"""Which candidates may become negatives: pure functions of a table of candidates, one mask each, each counted.

A row of the table holds one query's candidates, best first; -1 marks an empty place. The tables are tensors on one device.
Every filter sees what the earlier ones kept, so the counters add up to what was dropped. Filters on what is known come first
(judged, an equal text, a duplicate). The rules on ranks and scores follow; they guess which of the rest are positives that
nobody has judged.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mining.settings import FilterSettings
from trainer.handoff.margins import Margins, ceiling
from trainer.handoff.settings import Margin, Which

FEW_SLOTS, MOST_SLOTS = 1 << 12, 1 << 24  # of a table of a byte each
SPREAD = 0x9E3779B1  # odd, so that lists with neighbouring numbers have their values in distant slots


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
    passage_N: np.ndarray  # (N,) int64, of the whole corpus; it stays on the host, which may map it from a file

    def of_passages(self, ids: Tensor) -> Tensor:
        """Return the keys of some passages, on the device of their ids; of -1 any key."""
        found = np.take(self.passage_N, ids.cpu().numpy(), mode="clip")  # the other modes check, and take longer
        return torch.from_numpy(np.asarray(found)).to(ids.device)


@dataclass(frozen=True)
class OwnTexts:
    """The passages that belong to each of Q queries, and so are no negatives of it. Queries with one text share a list; there
    are L lists.
    """

    list_of_Q: Tensor  # (Q,) int64
    indptr: Tensor  # (L + 1,) int64
    rows: Tensor  # corpus rows judged relevant, in any split, to any query of the text, or with the id of such a query
    keys: tuple[Keys, ...]  # of these queries; every way counts

    def some(self, at: np.ndarray) -> "OwnTexts":
        """Return those of some of the queries."""
        keys = tuple(Keys(each.query_Q[at], each.passage_N) for each in self.keys)
        return OwnTexts(self.list_of_Q[torch.from_numpy(at).to(self.list_of_Q.device)], self.indptr, self.rows, keys)


@dataclass(frozen=True)
class Positives:
    """The scores of the positives of Q queries, in CSR form, at least one a query; None: unknown, as for BM25."""

    indptr: np.ndarray  # (Q + 1,) int64
    scores: np.ndarray | None  # (p,) float32
    teacher_scores: np.ndarray | None = None  # (p,) float32, a cross-encoder's

    def some(self, at: np.ndarray) -> "Positives":
        """Return those of some of the queries."""
        indptr, at_p = some_lists(self.indptr, at)
        return Positives(indptr, *(None if found is None else found[at_p] for found in (self.scores, self.teacher_scores)))

    def deciding(self, scores: np.ndarray | None, which: Which) -> np.ndarray | None:
        """Return the score of the positive that decides for each query, (Q,): of several the lowest, or else the best."""
        if scores is None:
            return None
        return (np.minimum if which == "lowest" else np.maximum).reduceat(scores, self.indptr[:-1])

    def any_admits(self, margins: Margins, scores_QK: Tensor, teacher_QK: Tensor | None) -> Tensor:
        """Tell which candidates are below all margins of at least one positive of their query, (Q, K) bool.

        teacher_QK: a cross-encoder's scores, needed for `teacher_margin`.
        """
        assert self.scores is not None
        rules = [(scores_QK, most_p) for _, most_p in margins.ceilings(self.scores)]
        if margins.teacher_margin != "off":
            assert teacher_QK is not None and self.teacher_scores is not None
            rules.append((teacher_QK, ceiling(self.teacher_scores, margins.teacher_margin, 0)))
        admitted_QK, count_Q = torch.zeros_like(scores_QK, dtype=torch.bool), np.diff(self.indptr)
        for place in range(count_Q.max(initial=0)):
            rows = np.flatnonzero(count_Q > place)  # so the work follows the number of positives
            row_n = torch.from_numpy(rows).to(scores_QK.device)
            is_below_nK = torch.ones_like(admitted_QK[row_n])
            for found_QK, most_p in rules:
                most_n = torch.from_numpy(most_p[self.indptr[rows] + place]).to(scores_QK.device)
                is_below_nK &= found_QK[row_n] < most_n[:, None]
            admitted_QK[row_n] |= is_below_nK
        return admitted_QK


class Kept:
    """Which candidates are left, and how many each filter dropped."""

    def __init__(self, ids_QK: Tensor):
        self.mask_QK = ids_QK >= 0
        self.num_left = int(self.mask_QK.count_nonzero())
        self.dropped: dict[str, int] = {}

    def narrow(self, name: str, allowed_QK: Tensor) -> None:
        """Keep what is allowed and count what is not under a name."""
        self.mask_QK = self.mask_QK & allowed_QK
        num_before, self.num_left = self.num_left, int(self.mask_QK.count_nonzero())
        self.dropped[name] = self.dropped.get(name, 0) + num_before - self.num_left

    def empty(self) -> Tensor:
        """Return which queries have nothing left, (Q,) bool."""
        return ~self.mask_QK.any(1)


def drop_known(settings: FilterSettings, kept: Kept, ids_QK: Tensor, own: OwnTexts) -> None:
    """Drop what is known to be no negative of its query: judged, with the text of the query or a positive, or a repeat."""
    kept.narrow("judged", ~is_listed(ids_QK, own.indptr, own.rows, own.list_of_Q))
    found = [(keys, keys.of_passages(ids_QK)) for keys in own.keys if settings.equal_texts or settings.duplicates]
    for keys, key_QK in found if settings.equal_texts else ():
        query_Q = torch.tensor(keys.query_Q, device=key_QK.device)
        is_own_QK = is_listed(key_QK, own.indptr, keys.of_passages(own.rows), own.list_of_Q)
        kept.narrow("equal_texts", ~is_own_QK & (key_QK != query_Q[:, None]))
    for _, key_QK in found if settings.duplicates else ():
        kept.narrow("duplicates", is_first_of_its_key(key_QK, kept.mask_QK))


def drop_by_rank(settings: FilterSettings, kept: Kept) -> None:
    """Drop candidates by their place among those left: the first ones, which may be positives, and those too far away to teach
    anything.
    """
    if settings.range_min or settings.range_max != "off":
        place_QK = kept.mask_QK.cumsum(1) - 1
        last = place_QK.shape[1] if settings.range_max == "off" else settings.range_max
        kept.narrow("range", (place_QK >= settings.range_min) & (place_QK < last))


def drop_by_score(
    settings: FilterSettings, margins: Margins, kept: Kept, scores_QK: Tensor, positive_score_Q: np.ndarray | None
) -> None:
    """Drop candidates that score as high as a positive, or too low.

    positive_score_Q: score of the positive that decides for each query; None: no scores to compare with (BM25), and no rules.
    """
    if positive_score_Q is None:
        return
    if settings.max_score != "off":
        kept.narrow("max_score", scores_QK < settings.max_score)
    if settings.min_score != "off":
        kept.narrow("min_score", scores_QK >= settings.min_score)
    for name, ceiling_Q in margins.ceilings(positive_score_Q):
        kept.narrow(name, scores_QK < torch.from_numpy(ceiling_Q).to(scores_QK.device)[:, None])


def is_listed(value_QK: Tensor, indptr: Tensor, listed: Tensor, list_of_Q: Tensor | None = None) -> Tensor:
    """Tell for each value, (Q, K), whether its row's list in the CSR table (indptr, listed) has it.

    list_of_Q: which list each row has; None: its own, in order.
    """
    found_n = torch.zeros(value_QK.numel(), dtype=torch.bool, device=value_QK.device)
    if len(listed) == 0:
        return found_n.view(value_QK.shape)
    list_of_p = torch.repeat_interleave(indptr.diff())
    if list_of_Q is None:
        list_of_Q = torch.arange(len(value_QK), device=value_QK.device)
    # A list and a value have one slot of a table together. An empty slot clears nearly all; the others are looked for.
    last_slot = min(MOST_SLOTS, max(FEW_SLOTS, 1 << (64 * len(listed)).bit_length())) - 1
    is_taken = found_n.new_zeros(last_slot + 1)
    is_taken[(listed + list_of_p * SPREAD) & last_slot] = True
    slot_QK = (value_QK + list_of_Q[:, None] * SPREAD) & last_slot
    at_n = places_of(is_taken.index_select(0, slot_QK.flatten()))
    value_n, list_n = value_QK.flatten()[at_n], list_of_Q[at_n // max(1, value_QK.shape[1])]
    # A pair (list, value) is one number, so that one sorted search answers for all rows.
    distinct = torch.unique(listed)
    place_n = torch.searchsorted(distinct, value_n).clamp(max=len(distinct) - 1)
    pair_p = list_of_p * len(distinct) + torch.searchsorted(distinct, listed)
    found_n[at_n] = (distinct[place_n] == value_n) & torch.isin(list_n * len(distinct) + place_n, pair_p)
    return found_n.view(value_QK.shape)


def is_first_of_its_key(key_QK: Tensor, keep_QK: Tensor) -> Tensor:
    """Tell for each kept place whether no earlier kept one of its row has the same key; true where not kept."""
    is_first = torch.ones_like(keep_QK)
    # Most rows have no two keys alike, and half of their bits, sorted, show it.
    half_QK = _sorted(key_QK.to(torch.int32))
    rows = places_of((half_QK[:, 1:] == half_QK[:, :-1]).any(1))
    if len(rows) == 0:
        return is_first
    key_nK, keep_nK = key_QK[rows], keep_QK[rows]
    # Kept places first, then by key, then by place: equal keys stand side by side, the best one first.
    order = key_nK.sort(dim=1, stable=True).indices
    is_left = (~keep_nK).gather(1, order).to(torch.uint8)
    order = order.gather(1, is_left.sort(dim=1, stable=True).indices)
    sorted_key, sorted_keep = key_nK.gather(1, order), keep_nK.gather(1, order)
    repeats = torch.zeros_like(keep_nK)
    repeats[:, 1:] = (sorted_key[:, 1:] == sorted_key[:, :-1]) & sorted_keep[:, 1:]
    is_first[rows] = torch.empty_like(keep_nK).scatter_(1, order, ~repeats)
    return is_first


def _sorted(value_QK: Tensor) -> Tensor:
    """Return each row in order; numpy takes an eighth of torch's time on a CPU."""
    return value_QK.sort(1).values if value_QK.is_cuda else torch.from_numpy(np.sort(value_QK.numpy(), 1))


def places_of(is_so: Tensor) -> Tensor:
    """Return the places of what is so in a table read row by row, (n,) int64, ascending; on a CPU by numpy, as above."""
    return is_so.flatten().nonzero()[:, 0] if is_so.is_cuda else torch.from_numpy(np.flatnonzero(is_so.numpy()))


def some_lists(indptr: np.ndarray, lists: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the CSR table of some lists of another: (indptr, places of their elements in the other)."""
    count = np.diff(indptr)[lists]
    new_indptr = np.concatenate([[0], np.cumsum(count)])
    return new_indptr, np.repeat(indptr[lists] - new_indptr[:-1], count) + np.arange(new_indptr[-1])
