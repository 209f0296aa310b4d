"""The same dropout in both encodings of a chunk, by a seed that counts (seed, step, rank, tower, chunk).

Nothing is copied: the generator is set before each chunk. Source of the idea: RandContext of GradCache (Gao et al.
2021, arXiv 2101.06983), which copies generator states instead.
"""

import contextlib
from collections.abc import Iterator

import torch

_MASK = (1 << 64) - 1


def replay_seed(*counters: int) -> int:
    """Return a 63-bit seed of (seed, step, rank, tower, chunk), or of other counters; all realistic ones differ.

    Source: splitmix64 (Steele et al. 2014).
    """
    state = 0
    for value in counters:
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


@contextlib.contextmanager
def borrowed_generators() -> Iterator[None]:
    """Use the random generators during the block, and put them back into the state that the caller left them in."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
