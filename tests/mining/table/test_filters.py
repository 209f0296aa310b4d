"""Filters against plain Python, on tables small enough to have every case often."""

import numpy as np
import pytest
import torch

from mining.settings import FilterSettings
from mining.table import filters
from mining.table.filters import (
    Kept,
    Keys,
    OwnTexts,
    Positives,
    drop_by_rank,
    drop_by_score,
    drop_known,
    is_first_of_its_key,
    is_listed,
    margins_of,
)
from tests.mining.table.device import on
from trainer.errors import InputError


def own_texts(rows, keys):
    """Return the one list of one query."""
    return OwnTexts(*map(on, ([0], [0, len(rows)], rows)), (keys,))


def drop(settings, kept, scores, positive):
    """What the miner does with what is not known to be wrong."""
    drop_by_rank(settings, kept)
    drop_by_score(settings, margins_of(settings), kept, on(scores), positive)


def table(seed, high, shape=(30, 12)):
    return np.random.default_rng(seed).integers(0, high, shape)


def lists(seed, num_rows, high):
    counts = np.random.default_rng(seed).integers(0, 4, num_rows)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return indptr, np.random.default_rng(seed + 1).integers(0, high, indptr[-1])


@pytest.mark.parametrize("seed", range(5))
def test_listed_values_are_those_of_the_row_itself(seed):
    values, (indptr, listed) = table(seed, 20), lists(seed, 30, 20)
    plain = [[v in listed[indptr[q] : indptr[q + 1]] for v in row] for q, row in enumerate(values)]
    np.testing.assert_array_equal(is_listed(on(values), on(indptr), on(listed)).cpu(), plain)
    assert 0 < np.sum(plain) < values.size
    # Keys are any 64-bit numbers; and rows may share a list.
    spread, lists_of = (v * 2**59 - 2**62 for v in (values, listed)), np.arange(60) % 30
    found = is_listed(*map(on, (np.tile(next(spread), (2, 1)), indptr, next(spread), lists_of)))
    np.testing.assert_array_equal(found.cpu(), plain + plain)


def test_a_table_with_few_slots_lists_the_same(monkeypatch):
    tables = on(table(0, 20)), *map(on, lists(0, 30, 20))
    plain = is_listed(*tables)
    monkeypatch.setattr(filters, "FEW_SLOTS", 2)
    monkeypatch.setattr(filters, "MOST_SLOTS", 2)  # as for lists of hundreds of millions
    assert torch.equal(is_listed(*tables), plain)


def test_nothing_is_listed_in_empty_lists():
    assert not is_listed(on(table(0, 3)), on(np.zeros(31, int)), on(np.zeros(0, int))).any()
    assert is_listed(on(np.zeros((0, 5), int)), on([0]), on(np.zeros(0, int))).shape == (0, 5)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_kept_one_of_equal_texts_stays(seed):
    keys, keep = table(seed, 6), table(seed + 1, 3) > 0
    keys[::3] = np.arange(keys.shape[1])
    plain = np.ones(keys.shape, bool)
    for q, row in enumerate(keys):
        seen = set()
        for j, key in enumerate(row):
            if keep[q, j]:
                plain[q, j] = key not in seen
                seen.add(key)
    for found in (keys, keys * 2**40 - 2**42):  # whose halves are alike
        np.testing.assert_array_equal(is_first_of_its_key(on(found), on(keep)).cpu(), plain)
    assert not plain.all() and plain.all(1).any(), "rows with and without a repeat"


# Each rule in the words of its source, of the place among the candidates left, the score and the positive's score.
PLAIN = {
    "shifted (NV-Retriever)": (dict(range_min=3), lambda j, s, p: j >= 3),
    "band (SciNCL)": (dict(range_min=2, range_max=5), lambda j, s, p: j in (2, 3, 4)),
    "TopK-Abs": (dict(max_score=0.3), lambda j, s, p: s < 0.3),
    "floor": (dict(min_score=-0.2), lambda j, s, p: s >= -0.2),
    "TopK-PercPos": (dict(relative_margin=0.2), lambda j, s, p: s < (0.8 * p if p > 0 else 1.2 * p)),
    "TopK-MarginPos": (dict(absolute_margin=0.25), lambda j, s, p: s < p - 0.25),
    "UniME's mask": (dict(absolute_margin=-0.25), lambda j, s, p: not s >= p + 0.25),
    "adaptive": (dict(adaptive_margin=(0.1, 0.5)), lambda j, s, p: p - s > 0.1 + 0.5 * abs(p)),
}


@pytest.mark.parametrize("rule", PLAIN)
def test_each_rule_keeps_what_its_formula_says_for_scores_of_any_sign(rule):
    settings, plain = PLAIN[rule]
    random = np.random.default_rng(len(rule))
    # Quarters of tenths: no score stands on a threshold, where the last bit would decide.
    scores = -np.sort(-(random.integers(-40, 40, (50, 9)) / 40 + 0.0125), axis=1).astype(np.float32)
    positive = (random.integers(-40, 40, 50) / 40).astype(np.float32)
    kept = Kept(on(np.where(random.random(scores.shape) < 0.8, 1, -1)))
    known = kept.mask_QK.cpu().numpy()
    drop(FilterSettings(**{"relative_margin": "off", **settings}), kept, scores, positive)
    expected = np.zeros(known.shape, bool)
    for q, j in zip(*np.nonzero(known), strict=True):
        expected[q, j] = plain(known[q, :j].sum(), scores[q, j], positive[q])
    np.testing.assert_array_equal(kept.mask_QK.cpu(), expected)
    assert 0 < kept.num_left == expected.sum() < known.sum()
    assert sum(kept.dropped.values()) == known.sum() - kept.num_left


@pytest.mark.parametrize("positive", [0.8, -0.8, 0.0])
@pytest.mark.parametrize("margin", [dict(relative_margin=0.05), dict(relative_margin=0), dict(adaptive_margin=(0.0, 0.3))])
def test_no_margin_lets_a_score_as_high_as_the_positives_pass(positive, margin):
    kept = Kept(on(np.zeros((1, 3), int)))
    scores = np.array([[positive + 0.01, positive, positive - 0.5]], np.float32)
    drop(FilterSettings(**{"relative_margin": "off", **margin}), kept, scores, np.array([positive], np.float32))
    assert kept.mask_QK.tolist() == [[False, False, True]]


def test_the_positive_that_decides_is_the_lowest_unless_the_settings_say_otherwise():
    # The example of the margins' doc: positives of .9 and .5, a candidate of .8.
    positives = Positives(np.array([0, 2, 3]), np.array([0.9, 0.5, 0.7], np.float32))
    scores = np.array([[0.8, 0.4], [0.68, 0.6]], np.float32)
    kept_by = {}
    for which in ("lowest", "best", "each"):
        settings, kept = FilterSettings(positive=which), Kept(on(np.zeros((2, 2), int)))
        drop(settings, kept, scores, positives.deciding(positives.scores, which))
        kept_by[which] = kept.mask_QK.tolist()
    assert FilterSettings().positive == "lowest" and kept_by["lowest"] == [[False, True], [False, True]]
    assert kept_by["best"] == kept_by["each"] == [[True, True], [False, True]]


@pytest.mark.parametrize("seed", range(4))
def test_each_keeps_what_one_positive_admits_by_all_margins_at_once(seed):
    random = np.random.default_rng(seed)
    counts = random.integers(1, 5, 20)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    positive, teacher = random.normal(size=(2, indptr[-1])).astype(np.float32)
    scores, asked = random.normal(size=(2, 20, 6)).astype(np.float32)
    margins = margins_of(FilterSettings(relative_margin=0.1, absolute_margin=0.2), teacher_margin=0.3)
    found = Positives(indptr, positive, teacher).any_admits(margins, on(scores), on(asked))
    plain = [
        [
            any(
                s < p - 0.1 * abs(p) and s < p - 0.2 and c < t - 0.3
                for p, t in zip(positive[indptr[q] : indptr[q + 1]], teacher[indptr[q] : indptr[q + 1]], strict=True)
            )
            for s, c in zip(scores[q], asked[q], strict=True)
        ]
        for q in range(20)
    ]
    np.testing.assert_array_equal(found.cpu(), plain)
    assert 10 < np.sum(plain) < 110


def test_every_filter_counts_what_the_earlier_ones_left():
    ids = on([[0, 1, 2, 3, 4, 5, 6, -1]])
    scores = np.array([[0.99, 0.98, 0.97, 0.95, 0.94, 0.7, 0.5, -np.inf]], np.float32)
    keys = np.array([10, 11, 12, 13, 13, 15, 16, 16, -1, 12])
    # 0 is judged, 1 has the query's text, 2 that of the positive, 4 that of 3; the positive scores 0.98
    own = own_texts([0, 9], Keys(np.array([11]), keys))
    settings, kept = FilterSettings(relative_margin=0.05, absolute_margin=0.3), Kept(ids)
    drop_known(settings, kept, ids, own)
    drop(settings, kept, scores, np.array([0.98], np.float32))
    assert kept.dropped == {"judged": 1, "equal_texts": 2, "duplicates": 1, "relative_margin": 1, "absolute_margin": 1}
    assert kept.mask_QK.flatten().nonzero().tolist() == [[6]]


def test_filters_can_be_turned_off_but_for_the_judged():
    ids, own = on([[0, 1, 1]]), own_texts([0], Keys(np.array([5]), np.array([5, 5])))
    off, kept = FilterSettings(equal_texts=False, duplicates=False, relative_margin="off"), Kept(ids)
    drop_known(off, kept, ids, own)
    drop(off, kept, np.ones((1, 3), np.float32), np.zeros(1, np.float32))
    assert kept.mask_QK.tolist() == [[False, True, True]] and kept.dropped == {"judged": 1}


def test_without_scores_of_positives_only_ranks_count():
    kept = Kept(on(np.zeros((1, 4), int)))
    drop(FilterSettings(range_max=2, max_score=0.0), kept, np.ones((1, 4), np.float32), None)
    assert kept.mask_QK.tolist() == [[True, True, False, False]] and kept.dropped == {"range": 2}


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(range_min=5, range_max=5), r"filter\.range_max=5 must be more than filter\.range_min=5"),
        (dict(min_score=0.7, max_score=0.7), r"filter\.min_score=0\.7 must be less than filter\.max_score=0\.7"),
    ],
)
def test_rules_that_keep_nothing_or_make_no_sense_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        FilterSettings(**settings)
