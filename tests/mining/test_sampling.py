"""Draws against their distributions, and against themselves in other tiles."""

import numpy as np
import pytest

from mining.sampling import SampleSettings, gumbel_noise, sample_negatives

NUM_QUERIES, NUM_CANDIDATES = 20_000, 6
ROWS = np.arange(NUM_QUERIES)
IDS = np.broadcast_to(np.arange(NUM_CANDIDATES) + 10, (NUM_QUERIES, NUM_CANDIDATES))
SCORES = np.broadcast_to(np.linspace(0.9, 0.4, NUM_CANDIDATES, dtype=np.float32), IDS.shape)
KEEP = np.broadcast_to(np.array([True, True, False, True, True, True]), IDS.shape)
POSITIVE = np.full(NUM_QUERIES, 0.8, np.float32)


def draw(rows=slice(None), seed=0, version=1, **settings):
    chosen = SampleSettings(**settings)
    return sample_negatives(chosen, seed, version, ROWS[rows], IDS[rows], SCORES[rows], KEEP[rows], POSITIVE[rows])


def frequencies(ids):
    return np.bincount(ids - 10, minlength=NUM_CANDIDATES) / NUM_QUERIES


def test_top_takes_the_best_that_passed():
    counts, ids, scores = draw(method="top", num_negatives=3)
    assert (counts == 3).all()
    np.testing.assert_array_equal(ids.reshape(-1, 3), np.broadcast_to([10, 11, 13], (NUM_QUERIES, 3)))
    np.testing.assert_allclose(scores[:3], [0.9, 0.8, 0.6], rtol=1e-6)


def test_uniform_draws_each_that_passed_equally_often():
    _, ids, _ = draw(method="uniform", num_negatives=2)
    # Two of five without replacement: 0.4 each, standard error 0.0035.
    np.testing.assert_allclose(frequencies(ids), [0.4, 0.4, 0, 0.4, 0.4, 0.4], atol=0.015)


def test_simans_draws_with_the_probabilities_of_its_formula():
    _, ids, _ = draw(method="simans", num_negatives=1, simans_a=20.0, simans_b=-0.1)
    weight = np.where(KEEP[0], np.exp(-20.0 * (SCORES[0] - 0.8 + 0.1) ** 2), 0)
    np.testing.assert_allclose(frequencies(ids), weight / weight.sum(), atol=0.015)


@pytest.mark.parametrize("method", ["uniform", "top", "simans"])
def test_rows_are_sorted_by_score_and_never_repeat(method):
    counts, ids, scores = draw(method=method, num_negatives=4)
    assert (np.diff(scores.reshape(-1, 4)) < 0).all() and (np.diff(ids.reshape(-1, 4)) > 0).all()
    assert (counts == 4).all() and 12 not in ids


def test_fewer_that_passed_are_all_taken():
    counts, ids, _ = draw(slice(0, 3), num_negatives=50)
    assert counts.tolist() == [5, 5, 5] and ids.tolist() == [10, 11, 13, 14, 15] * 3


@pytest.mark.parametrize("method", ["uniform", "simans"])
def test_the_draw_does_not_depend_on_how_queries_are_dealt_out(method):
    whole = draw(slice(0, 100), method=method, num_negatives=2)
    parts = [draw(rows, method=method, num_negatives=2) for rows in (slice(0, 1), slice(1, 34), slice(34, 100))]
    for all_at_once, piece_by_piece in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(all_at_once, np.concatenate(piece_by_piece))


def test_another_seed_or_version_draws_others():
    first = draw(num_negatives=1)[1]
    for other in (draw(num_negatives=1, seed=1)[1], draw(num_negatives=1, version=2)[1]):
        assert 0.7 < np.mean(first != other) < 0.9  # 4 of 5 differ by chance


def test_simans_without_positive_scores_is_uniform():
    args = 0, 1, ROWS, IDS, SCORES, KEEP, None
    both = [sample_negatives(SampleSettings(method=m, num_negatives=2), *args)[1] for m in ("simans", "uniform")]
    np.testing.assert_array_equal(*both)


def test_noise_has_the_mean_of_gumbels():
    noise = gumbel_noise(0, 0, ROWS, IDS)
    assert noise.mean() == pytest.approx(0.5772, abs=0.01) and np.isfinite(noise).all()
