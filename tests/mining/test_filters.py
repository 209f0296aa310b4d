"""Filters against plain Python, on tables small enough to have every case often."""

import numpy as np
import pytest

from mining.filters import FilterSettings, OwnTexts, filter_candidates, is_first_of_its_key, is_listed, relative_ceiling
from trainer.errors import InputError


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
    np.testing.assert_array_equal(is_listed(values, indptr, listed), plain)
    assert 0 < np.sum(plain) < values.size


def test_nothing_is_listed_in_empty_lists():
    assert not is_listed(table(0, 3), np.zeros(31, int), np.zeros(0, int)).any()


@pytest.mark.parametrize("seed", range(5))
def test_the_first_kept_one_of_equal_texts_stays(seed):
    keys, keep = table(seed, 6), table(seed + 1, 3) > 0
    plain = np.ones(keys.shape, bool)
    for q, row in enumerate(keys):
        seen = set()
        for j, key in enumerate(row):
            if keep[q, j]:
                plain[q, j] = key not in seen
                seen.add(key)
    np.testing.assert_array_equal(is_first_of_its_key(keys, keep), plain)
    assert not plain.all()


@pytest.mark.parametrize("positive", [0.8, -0.8, 0.0])
def test_the_relative_margin_never_lets_scores_above_the_positive_pass(positive):
    ceiling = relative_ceiling(np.array([positive], np.float32), 0.05)[0]
    assert ceiling <= positive and ceiling == pytest.approx(positive - 0.05 * abs(positive))


def test_every_filter_counts_what_the_earlier_ones_left():
    ids = np.array([[0, 1, 2, 3, 4, 5, 6, -1]])
    scores = np.array([[0.99, 0.98, 0.97, 0.95, 0.94, 0.7, 0.5, -np.inf]], np.float32)
    keys = np.array([[10, 11, 12, 13, 13, 15, 16, 16]])
    # 0 is judged, 1 has the query's text, 2 that of the positive, 4 that of 3; the positive scores 0.98
    own = OwnTexts(np.array([0, 2]), np.array([0, 9]), np.array([0, 3]), np.array([10, 12, 11]))
    settings = FilterSettings(relative_margin=0.05, absolute_margin=0.3)
    keep, dropped = filter_candidates(settings, ids, scores, keys, own, np.array([0.98], np.float32))
    assert dropped == {"judged": 1, "equal_texts": 2, "duplicates": 1, "relative_margin": 1, "absolute_margin": 1}
    np.testing.assert_array_equal(np.flatnonzero(keep), [6])


def test_filters_can_be_turned_off_but_for_the_judged():
    ids, own = np.array([[0, 1, 1]]), OwnTexts(np.array([0, 1]), np.array([0]), np.array([0, 1]), np.array([5]))
    off = FilterSettings(equal_texts=False, duplicates=False, relative_margin="off")
    keep, dropped = filter_candidates(off, ids, np.ones((1, 3), np.float32), ids * 0 + 5, own, np.zeros(1, np.float32))
    assert keep.tolist() == [[False, True, True]] and dropped == {"judged": 1}


def test_a_negative_margin_is_refused():
    with pytest.raises(InputError, match=r"filter\.relative_margin=-0\.1 is negative"):
        FilterSettings(relative_margin=-0.1)
