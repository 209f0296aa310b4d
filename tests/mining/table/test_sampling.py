"""Draws against plain Python, against their distributions, and against themselves in other tiles."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mining.settings import SampleSettings
from mining.table.sampling import (
    choose_candidates,
    gumbel_noise,
    is_easy,
    lowest_candidates,
    mix_int64,
    random_numbers,
    uniform_numbers,
)
from tests.mining.table.device import on
from tests.mining.table.test_draw import JUDGED
from trainer.data.shuffle import mix

NUM_QUERIES, NUM_CANDIDATES = 20_000, 6
ROWS = np.arange(NUM_QUERIES)
IDS = np.broadcast_to(np.arange(NUM_CANDIDATES) + 10, (NUM_QUERIES, NUM_CANDIDATES))
SCORES = np.broadcast_to(np.linspace(0.9, 0.4, NUM_CANDIDATES, dtype=np.float32), IDS.shape)
KEEP = np.broadcast_to(np.array([True, True, False, True, True, True]), IDS.shape)
POSITIVE = np.full(NUM_QUERIES, 0.8, np.float32)
RANDOM_METHODS = ["uniform", "top1", "simans", "simans_laplace", "softmax"]


def draw(rows=slice(None), seed=0, version=1, stays=None, positive=POSITIVE, keep=KEEP, **settings):
    tables = on(IDS[rows]), on(SCORES[rows]), on(keep[rows])
    positive, stays = None if positive is None else positive[rows], None if stays is None else on(stays[rows])
    return choose_candidates(SampleSettings(**settings), (seed, version), ROWS[rows], *tables, positive, stays).cpu().numpy()


def plain_mix(x):
    """SplitMix64's finaliser, with Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def plain_choice(settings, seed, version, query_row, ids, scores, keep, positive, stays):
    """Return what one query draws, one candidate after the other."""
    places = [j for j in range(len(ids)) if keep[j]]
    first = {j for j in places if stays[j] or (settings.method == "top1" and j == places[0])}
    of_query = plain_mix((plain_mix((plain_mix(seed) + version) % 2**64) + query_row) % 2**64)

    def priority(j):
        noise = -math.log(-math.log(((plain_mix((of_query + int(ids[j])) % 2**64) >> 11) + 0.5) * 2**-53))
        s, away = float(scores[j]), float(scores[j]) - float(positive) - settings.simans_b
        by_method = {"top": s, "simans": noise - settings.simans_a * away**2, "softmax": noise + s / settings.softmax_temperature}
        return (math.inf if j in first else by_method.get(settings.method, noise), -j)

    places = [j for rank, j in enumerate(places) if settings.pool == "all" or rank < settings.pool or j in first]
    return sorted(sorted(places, key=priority)[::-1][: settings.num_negatives - settings.num_random])


@pytest.mark.parametrize("method", ["uniform", "top", "top1", "simans", "softmax"])
@pytest.mark.parametrize("more", [{}, {"pool": 5}, {"random_share": 0.5, "num_negatives": 5}])
def test_a_draw_is_that_of_plain_python(method, more):
    random, shape = np.random.default_rng(len(method)), (40, 12)
    ids, rows = random.integers(0, 2**31, shape), random.integers(0, 2**40, len(ROWS[:40]))
    scores = -np.sort(-random.integers(0, 9, shape).astype(np.float32) / 9, axis=1)  # many are equal
    keep, stays, positive = random.random(shape) < 0.7, random.random(shape) < 0.2, random.random(40).astype(np.float32)
    settings = SampleSettings(**{"method": method, "num_negatives": 3, "simans_a": 4.0, "softmax_temperature": 0.5, **more})
    found = choose_candidates(settings, (2**63 + 5, 7), rows, *map(on, (ids, scores, keep)), positive, on(stays))
    for q, drawn in enumerate(found.cpu()):
        plain = plain_choice(settings, 2**63 + 5, 7, int(rows[q]), ids[q], scores[q], keep[q], positive[q], stays[q])
        assert drawn.nonzero()[:, 0].tolist() == plain


def test_the_mix_of_int64_is_that_of_uint64():
    bits = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64)
    bits[:4] = 0, 1, 2**63, 2**64 - 1
    found = mix_int64(on(bits.view(np.int64))).cpu().numpy().view(np.uint64)
    np.testing.assert_array_equal(found, mix(bits))
    assert [int(x) for x in found[:50]] == [plain_mix(int(x)) for x in bits[:50]]


def test_top_takes_the_best_that_passed():
    np.testing.assert_array_equal(draw(method="top", num_negatives=3), np.broadcast_to([1, 1, 0, 1, 0, 0], IDS.shape))


def test_uniform_draws_each_that_passed_equally_often():
    # Two of five without replacement: 0.4 each, standard error 0.0035.
    np.testing.assert_allclose(draw(method="uniform", num_negatives=2).mean(0), [0.4, 0.4, 0, 0.4, 0.4, 0.4], atol=0.015)


WEIGHTS = {
    "simans": (dict(simans_a=20.0, simans_b=-0.1), lambda s: np.exp(-20.0 * (s - 0.8 + 0.1) ** 2)),
    "simans_laplace": (dict(laplace_a=3.0, simans_b=0.05), lambda s: np.exp(-3 * np.abs(s - 0.8 - 0.05))),
    "softmax": (dict(softmax_temperature=0.3), lambda s: np.exp(s / 0.3)),
}


@pytest.mark.parametrize("method", WEIGHTS)
def test_a_draw_has_the_probabilities_of_its_formula(method):
    settings, formula = WEIGHTS[method]
    weight = np.where(KEEP[0], formula(SCORES[0].astype(float)), 0)
    found = draw(method=method, num_negatives=1, **settings).mean(0)
    np.testing.assert_allclose(found, weight / weight.sum(), atol=0.015)
    assert weight[KEEP[0]].max() > 1.5 * weight[KEEP[0]].min(), "not uniform by chance"


def test_the_best_one_and_others_from_the_pool():
    found = draw(method="top1", num_negatives=2, pool=4)
    np.testing.assert_allclose(found.mean(0), [1, 1 / 3, 0, 1 / 3, 1 / 3, 0], atol=0.015)


@pytest.mark.parametrize("method", [*RANDOM_METHODS, "top"])
def test_fewer_that_passed_are_all_taken(method):
    np.testing.assert_array_equal(draw(slice(0, 3), method=method, num_negatives=50), KEEP[:3])
    assert not draw(slice(0, 2), method=method, keep=KEEP & False).any()
    assert draw(slice(0, 0), method=method).shape == (0, 6)


@pytest.mark.parametrize("method", RANDOM_METHODS)
def test_the_draw_does_not_depend_on_how_queries_are_dealt_out(method):
    whole = draw(slice(0, 100), method=method, num_negatives=2)
    parts = [draw(rows, method=method, num_negatives=2) for rows in (slice(0, 1), slice(1, 34), slice(34, 100))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (whole.sum(1) == 2).all()


def test_another_seed_or_version_draws_others():
    first = draw(num_negatives=1)
    for other in (draw(num_negatives=1, seed=1), draw(num_negatives=1, version=2)):
        assert 0.7 < (first != other).any(1).mean() < 0.9  # 4 of 5 differ by chance


@pytest.mark.parametrize("method", ["simans", "simans_laplace", "softmax"])
def test_what_needs_scores_of_embeddings_is_uniform_without(method):
    both = [draw(method=m, num_negatives=2, positive=None) for m in (method, "uniform")]
    np.testing.assert_array_equal(*both)


def test_noise_has_the_mean_of_gumbels():
    noise = gumbel_noise(uniform_numbers((0, 0), ROWS, on(np.repeat(ROWS, NUM_CANDIDATES)), on(IDS).flatten()))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01) and noise.isfinite().all()


def test_what_stays_is_drawn_first_even_outside_the_pool_but_never_if_it_was_dropped():
    stays = np.broadcast_to([False, False, True, False, False, True], IDS.shape)
    found = draw(method="uniform", num_negatives=2, pool=2, stays=stays)
    np.testing.assert_allclose(found.mean(0), [0.5, 0.5, 0, 0, 0, 1], atol=0.015)


def test_a_negative_is_easy_by_conans_rule():
    first = np.array([0.5, 0.5, 0.95, 0.5, 0.1, 0.92], np.float32)
    now = np.array([0.5, 0.45, 0.82, 0.4, -0.2, 0.79], np.float32)
    plain = [1.15 * n < f and abs(n) < 0.8 for n, f in zip(now, first, strict=True)]
    assert is_easy(SampleSettings(), on(now), on(first)).tolist() == plain == [False, False, False, True, True, True]


def test_the_lowest_candidates_are_the_last_that_are_left():
    keep = np.random.default_rng(0).random((40, 7)) < 0.5
    for found, kept in zip(lowest_candidates(2, on(keep)).cpu(), keep, strict=True):
        assert np.flatnonzero(found).tolist() == np.flatnonzero(kept)[-2:].tolist()


def test_random_numbers_are_uniform_and_rows_are_the_allowed_ones():
    allowed = np.array([3, 4, 9, 11])
    judgements = replace(JUDGED, allowed_N=np.isin(np.arange(13), allowed))
    assert judgements.allowed_rows(np.array([0, 1, 2, 3, -1])).tolist() == [*allowed, -1] and judgements.num_held_out == 9
    found = judgements.allowed_rows(random_numbers(0, 1, ROWS, range(5), 4))
    shares = [(found == row).mean() for row in allowed]
    np.testing.assert_allclose(shares, 0.25, atol=0.01)
    columns = np.corrcoef(np.searchsorted(allowed, found).T)
    assert np.abs(columns - np.eye(5)).max() < 0.03, "places of a row are independent"
    np.testing.assert_array_equal(found[7:9], judgements.allowed_rows(random_numbers(0, 1, ROWS[7:9], range(5), 4)))
    np.testing.assert_array_equal(random_numbers(0, 1, ROWS, range(2, 5), 4), random_numbers(0, 1, ROWS, range(5), 4)[:, 2:])
    assert (random_numbers(0, 1, ROWS, range(5), 4) != random_numbers(0, 2, ROWS, range(5), 4)).mean() > 0.7
    assert (random_numbers(0, 1, ROWS[:2], range(3), 0) == -1).all()
