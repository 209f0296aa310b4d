"""Ranks as threads talk as ranks of MPI do, and none waits for one that failed."""

import numpy as np
import pytest

import mining.ranks
from mining.ranks import Ranks
from tests.mining.threads import on_threads
from trainer.errors import InputError


def talk(ranks: Ranks):
    """Use every way in which ranks speak to each other; return what this one heard."""
    told = ranks.decide(lambda: ranks.rank + 7), ranks.together(lambda: ranks.rank), ranks.on_first(lambda: "first")
    gathered = ranks.gather(ranks.rank)
    swapped = ranks.exchange([(ranks.rank, other) for other in range(ranks.num_ranks)])
    # Rank s has s + r rows of three numbers for rank r.
    arrays = [np.full((ranks.rank + other, 3), 10 * ranks.rank + other, np.float32) for other in range(ranks.num_ranks)]
    return told, gathered, swapped, ranks.exchange_arrays(arrays)


def heard(rank: int, num_ranks: int, found) -> None:
    """Check what one rank heard."""
    told, gathered, swapped, arrays = found
    assert told == (7, rank, "first" if rank == 0 else None)
    assert gathered == (list(range(num_ranks)) if rank == 0 else [])
    assert swapped == [(other, rank) for other in range(num_ranks)]
    assert [array.shape for array in arrays] == [(other + rank, 3) for other in range(num_ranks)]
    assert all(array.dtype == np.float32 and (array == 10 * s + rank).all() for s, array in enumerate(arrays))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("round_bytes", [7, 1 << 28])
def test_all_hear_what_was_said_in_rounds_of_any_size(num_ranks, round_bytes, monkeypatch):
    monkeypatch.setattr(mining.ranks, "ROUND_BYTES", round_bytes)
    for rank, found in enumerate(on_threads(num_ranks, talk)):
        heard(rank, num_ranks, found)


def test_an_error_of_one_rank_is_raised_and_the_others_end():
    def fail(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise ValueError("one")
        ranks.meet()

    def refuse(ranks: Ranks) -> None:
        raise InputError(f"rank {ranks.rank}")

    with pytest.raises(ValueError, match="one"):
        on_threads(3, fail)
    with pytest.raises(InputError, match="rank 0"):
        on_threads(2, lambda ranks: ranks.together(lambda: refuse(ranks)))
