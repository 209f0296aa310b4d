"""A keyed permutation is one for any number of things, its inverse undoes it, and no place or pair is favoured."""

import numpy as np
import pytest

from trainer.data.sampler import single_order, step_parts
from trainer.data.shuffle import key_of, mix, shuffle, unshuffle

POWERS = [2**exponent + more for exponent in (2, 3, 4, 5, 8, 10, 16) for more in (-1, 0, 1)]
PRIMES = [2, 5, 7, 11, 97, 101, 997, 65_521]
FAR = 4.9  # standard deviations: once in a million


def epochs(num_things, num_epochs):
    """Orders of many epochs, (epochs, places)."""
    place, key = np.tile(np.arange(num_things), num_epochs), np.repeat(key_of(7, 0, np.arange(num_epochs)), num_things)
    return shuffle(place, num_things, key).reshape(num_epochs, num_things)


def deviation(counts, expected, degrees=None):
    """Of the sum of squares from what equal chances give, in standard deviations (Pearson)."""
    degrees = degrees or counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("num_things", sorted({1, 6, 10, 1000, 123_457, *POWERS, *PRIMES}))
def test_everything_has_one_place_and_the_inverse_finds_it(num_things):
    for seed in range(3):
        key = key_of(seed, 5, num_things)
        found = shuffle(np.arange(num_things), num_things, key)
        np.testing.assert_array_equal(np.sort(found), np.arange(num_things))
        np.testing.assert_array_equal(unshuffle(found, num_things, key), np.arange(num_things))


def test_numbers_beyond_32_bits_come_back_and_stay_in_their_range():
    for num_things in (2**33 - 1, 10**12 + 39, 2**52 + 1):
        place = np.random.default_rng(0).integers(num_things, size=5000)
        found = shuffle(place, num_things, key_of(1))
        assert found.min() >= 0 and found.max() < num_things and len(np.unique(found)) == len(np.unique(place))
        np.testing.assert_array_equal(unshuffle(found, num_things, key_of(1)), place)


def test_each_place_may_have_a_length_and_a_key_of_its_own():
    num_n, word_n = np.array([5, 70, 1, 1000]), np.arange(4)
    together = shuffle(np.array([4, 33, 0, 999]), num_n, key_of(0, 3, word_n))
    alone = [
        shuffle(np.array([at]), num, key_of(0, 3, word))[0] for at, num, word in zip((4, 33, 0, 999), num_n, word_n, strict=True)
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize("num_things", [2, 3, 5, 7, 16, 17, 64, 100])
def test_everything_stands_everywhere_equally_often(num_things):
    num_epochs = 4000
    found = epochs(num_things, num_epochs)
    counts = np.zeros((num_things, num_things))
    np.add.at(counts, (np.tile(np.arange(num_things), num_epochs), found.ravel()), 1)
    assert deviation(counts, num_epochs / num_things, degrees=(num_things - 1) ** 2) < FAR  # rows and columns add up


@pytest.mark.parametrize("num_things", [16, 31, 64, 100])
def test_neighbours_are_any_two_equally_often(num_things):
    num_epochs = 3000
    found = epochs(num_things, num_epochs)
    counts = np.zeros((num_things, num_things))
    np.add.at(counts, (found[:, :-1].ravel(), found[:, 1:].ravel()), 1)
    pairs = counts[~np.eye(num_things, dtype=bool)]
    assert deviation(pairs, num_epochs * (num_things - 1) / len(pairs)) < FAR


def test_what_stands_somewhere_says_nothing_about_the_next_epoch_or_seed():
    num_things = 1000
    first = single_order(0, num_things, num_things)
    others = [step_parts(first, 1), step_parts(single_order(1, num_things, num_things), 0)]
    rows = step_parts(first, 0)[0].rows
    place = np.argsort(rows)
    for ((_, other),) in others:
        assert abs(np.corrcoef(place, np.argsort(other))[0, 1]) < FAR / np.sqrt(num_things)
        assert (rows == other).sum() < 8, "one is expected at the same place"


def test_the_batches_of_a_large_epoch_are_spread_over_all_of_it():
    """The low and the high digit of a row must both look drawn: 64 x 64 fields, a million rows."""
    num_things = 1_000_003
    rows = np.concatenate([step_parts(single_order(3, num_things, 8192), step)[0].rows for step in range(20)])
    high, low = rows * 64 // num_things, rows % 64
    counts = np.bincount(high * 64 + low, minlength=4096)
    assert deviation(counts, len(rows) / 4096) < FAR


def test_a_mix_is_the_published_one():
    """The first numbers of SplitMix64 from seed 1234567, as its authors and Java have them."""
    state = 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    step = 0x9E3779B97F4A7C15
    assert [int(mix(np.uint64((state + i * step) % 2**64))) for i in range(3)] == expected
