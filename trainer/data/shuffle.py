"""A random order of any length that is computed place by place, so that nothing of its length is ever held.

A permutation of 0 … num - 1 is chosen by a 64-bit key; every function works on whole arrays, each element under its own
length and key. Equal arguments give equal numbers on every machine.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

ROUNDS = 8  # of the Feistel network; of fewer than ten things not all orders are equally frequent even so


def shuffle(place_n: np.ndarray, num: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return what stands at some places of a permutation of `num` things, (n,) int64.

    A place is written with two digits. In turn, a function of one digit is added to the other; if the result is out of range,
    the rounds are repeated on it. Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", generalised Feistel
    and cycle walking.
    """
    return _walk(_forward, place_n, num, key)


def unshuffle(thing_n: np.ndarray, num: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return the places at which some of `num` things stand, (n,) int64: the inverse of `shuffle`."""
    return _walk(_backward, thing_n, num, key)


def key_of(seed: int, *words: int | np.ndarray) -> np.ndarray:
    """Return a 64-bit key for a seed and some numbers, uint64; of arrays element by element."""
    state = np.asarray(seed, np.uint64)
    for word in words:
        state = mix(np.asarray(word).astype(np.uint64) ^ state)
    return state


def mix(x):
    """Return a 64-bit mix of each value, uint64. Source: the finaliser of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _walk(network: Callable[..., np.ndarray], value_n: np.ndarray, num: Any, key: np.ndarray) -> np.ndarray:
    num, key = np.asarray(num).astype(np.uint64), np.asarray(key)  # one of all, or one of each
    found = network(value_n.astype(np.uint64), num, key)
    while (left := np.flatnonzero(found >= num)).size:  # about one in the square root of `num`
        num_n, key_n = np.broadcast_to(num, found.shape), np.broadcast_to(key, found.shape)
        found[left] = network(found[left], num_n[left], key_n[left])
    return found.astype(np.int64)


def _forward(value_n: np.ndarray, num_n: np.ndarray, key_n: np.ndarray) -> np.ndarray:
    width_n, height_n = _digits(num_n)
    high_n, low_n = np.divmod(value_n, width_n)
    for turn in range(0, ROUNDS, 2):
        low_n = low_n + _drawn(high_n, turn, width_n, key_n)
        low_n = np.where(low_n < width_n, low_n, low_n - width_n)
        high_n = high_n + _drawn(low_n, turn + 1, height_n, key_n)
        high_n = np.where(high_n < height_n, high_n, high_n - height_n)
    return high_n * width_n + low_n


def _backward(value_n: np.ndarray, num_n: np.ndarray, key_n: np.ndarray) -> np.ndarray:
    width_n, height_n = _digits(num_n)
    high_n, low_n = np.divmod(value_n, width_n)
    for turn in range(ROUNDS - 2, -1, -2):
        high_n = high_n + height_n - _drawn(low_n, turn + 1, height_n, key_n)
        high_n = np.where(high_n < height_n, high_n, high_n - height_n)
        low_n = low_n + width_n - _drawn(high_n, turn, width_n, key_n)
        low_n = np.where(low_n < width_n, low_n, low_n - width_n)
    return high_n * width_n + low_n


def _digits(num_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many values each of the two digits has: near the square root of `num`, and together no fewer than `num`."""
    width_n = np.ceil(np.sqrt(num_n)).astype(np.uint64)
    return width_n, (num_n + width_n - np.uint64(1)) // width_n


def _drawn(other_n: np.ndarray, turn: int, size_n: np.ndarray, key_n: np.ndarray) -> np.ndarray:
    """Return a number below `size` that depends on the other digit, the turn and the key."""
    half = np.uint64(32)  # of the 64 bits; a digit has fewer
    return ((mix(other_n ^ mix(key_n ^ np.uint64(turn))) >> half) * size_n) >> half
