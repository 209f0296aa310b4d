"""Ranks as threads talk as ranks of MPI do, and none waits for one that failed."""

import pytest

import mining.ranks
from mining.ranks import Ranks
from tests.mining.talk import check_heard, talk
from tests.mining.threads import on_threads
from trainer.errors import InputError


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("round_bytes", [7, 1 << 28])
def test_all_hear_what_was_said_in_rounds_of_any_size(num_ranks, round_bytes, monkeypatch):
    monkeypatch.setattr(mining.ranks, "ROUND_BYTES", round_bytes)
    for rank, found in enumerate(on_threads(num_ranks, talk)):
        check_heard(rank, num_ranks, found)


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
