"""Ranks wait for each other for as long as anyone is at work, and no longer."""

import dataclasses
import time

import pytest

from tests.ranks import run_ranks
from tests.trainer.worlds import world_of
from trainer.errors import MachineFailed
from trainer.patience import Patience


def impatient(rank: int) -> Patience:
    return Patience(dataclasses.replace(world_of(rank), timeout_s=1.5))


def meet_late(rank):
    patience, waits = impatient(rank), []
    for late in range(3):  # each in turn is long at work
        if rank == late:
            with patience.at_work():
                time.sleep(2.5)
        patience.wait(lambda: waits.append(1))
    return len(waits)


def test_who_is_at_work_is_waited_for_beyond_the_limit():
    assert all(run_ranks(meet_late, 3))


def never_come(rank):
    if rank == 1:
        time.sleep(3)
        return "late"
    with pytest.raises(MachineFailed, match=r"1 of 2 ranks gave no sign of life for 1\.5 s .*parallel\.timeout_s"):
        impatient(rank).wait()
    return "told"


def test_who_gives_no_sign_is_not_waited_for_for_ever():
    assert run_ranks(never_come, 2) == ["told", "late"]


def hear_of_a_stop(rank):
    patience = Patience(world_of(rank))
    if rank == 1:
        assert patience.is_stopping(True)
    patience.wait()
    return Patience(world_of(rank)).is_stopping(False)


def test_one_that_is_asked_to_stop_tells_the_others():
    assert run_ranks(hear_of_a_stop, 2) == [True, True]


def test_one_rank_waits_for_nobody():
    patience = Patience(world_of())
    patience.wait()
    with patience.at_work():
        assert not patience.is_stopping(False) and patience.is_stopping(True)
