"""New negatives come into force at one step on all ranks, whole or not at all."""

import errno
import sys
import threading
import time

import numpy as np
import pytest

import trainer.feed
from tests.ranks import run_ranks
from tests.trainer.worlds import world_of
from trainer.errors import MachineFailed
from trainer.feed import NegativesFeed
from trainer.handoff.negatives import negatives_folder, publish_negatives
from trainer.handoff.settings import NegativesSettings, ScheduleEntry
from trainer.world import World


def publish(run, version):
    indptr = np.array([0, 1, 2])
    publish_negatives(run, version, indptr, np.array([version, 1]), np.zeros(2), {"checkpoint_step": 10 * version})


def open_feed(run, rank=0, is_used=True, **settings):
    settings = NegativesSettings(**{"first_wait_s": 30.0, **settings})
    return NegativesFeed(world_of(rank), run, settings, 2, 9, lambda: False, is_used=is_used)


def step_until(feed, version, limit_s=20.0):
    deadline, step = time.monotonic() + limit_s, 0
    while feed.in_force is None or feed.in_force.version != version:
        assert time.monotonic() < deadline, f"version {version} never came into force"
        feed.before_step(step)
        step += 1
        time.sleep(0.01)
    return step


def test_the_first_step_waits_for_version_0_and_later_steps_wait_for_nothing(tmp_path, monkeypatch):
    publish(tmp_path, 0)
    feed = open_feed(tmp_path)
    assert not feed.before_step(0)
    assert feed.in_force.version == 0
    monkeypatch.setattr(trainer.feed.time, "sleep", lambda seconds: pytest.fail("a step waits for a version that is not there"))
    for step in range(1, 50):
        feed.before_step(step)
    monkeypatch.undo()
    publish(tmp_path, 1)
    step_until(feed, 1)
    feed.close()


def test_no_thread_outlives_a_closed_feed(tmp_path):
    """One that did could be the last to hold the process group while Python ended, and torch aborted the rank."""
    publish(tmp_path, 0)
    before = threading.active_count()
    feed = open_feed(tmp_path)
    feed.before_step(0)
    assert threading.active_count() == before + 1
    feed.close()
    assert threading.active_count() == before


def test_a_torn_version_never_comes_into_force(tmp_path, caplog):
    publish(tmp_path, 0)
    feed = open_feed(tmp_path)
    feed.before_step(0)
    publish(tmp_path, 1)
    ids = negatives_folder(tmp_path) / "v000001" / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:-1])
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        feed.before_step(1)
        assert feed.in_force.version == 0
        time.sleep(0.05)
    publish(tmp_path, 2)
    step_until(feed, 2)
    feed.close()


def test_a_disk_that_fails_for_a_while_does_not_end_the_fetching(tmp_path, monkeypatch, caplog):
    publish(tmp_path, 0)
    monkeypatch.setattr(trainer.feed, "POLL_S", 0.01)
    plain, left = trainer.feed.open_negatives, [3]

    def refuse_pin(*_):
        raise MachineFailed("no room left")

    def refuse_a_while(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return plain(*arguments)

    monkeypatch.setattr(trainer.feed, "pin", refuse_pin)
    monkeypatch.setattr(trainer.feed, "open_negatives", refuse_a_while)
    feed = open_feed(tmp_path)
    feed.before_step(0)
    feed.close()
    assert feed.in_force.version == 0 and left[0] == -1
    assert caplog.text.count("not looked for while the disk fails: [Errno") == 1


def test_without_a_miner_training_starts_after_a_while(tmp_path, caplog):
    feed = open_feed(tmp_path, first_wait_s=0.3)
    assert not feed.before_step(0)
    assert feed.in_force is None and "starting with in-batch negatives" in caplog.text
    publish(tmp_path, 0)
    step_until(feed, 0)
    feed.close()


def test_a_schedule_is_waited_for_and_kept_to(tmp_path, caplog):
    caplog.set_level("INFO")
    publish(tmp_path, 0)
    feed = open_feed(tmp_path, schedule=(ScheduleEntry(checkpoint=5, step=5),))
    for step in range(5):
        feed.before_step(step)
        assert feed.in_force.version == 0
    waits = []

    def on_wait():
        waits.append(1)
        if len(waits) == 3:
            publish(tmp_path, 1)

    feed.before_step(5, on_wait)
    assert feed.in_force.version == 1 and len(waits) >= 2
    assert caplog.messages == ["negatives v000001 are not published yet; waiting for them"]
    feed.close()


def swap_on_ranks(rank, run):
    feed = open_feed(run, rank)
    in_force = []
    for step in range(400):
        feed.before_step(step)
        in_force.append(feed.in_force.version)
        if step == 20 and rank == 0:
            publish(run, 1)
        time.sleep(0.01 * (1 + rank))  # uneven ranks
        if in_force[-1] == 1:
            break
    feed.close()
    return in_force


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_all_ranks_switch_at_the_same_step(tmp_path, num_ranks):
    publish(tmp_path, 0)
    seen = run_ranks(swap_on_ranks, num_ranks, tmp_path)
    assert all(versions == seen[0] for versions in seen)
    assert seen[0][0] == 0 and seen[0][-1] == 1


def stop_on_ranks(rank, run):
    feed = open_feed(run, rank, is_used=False)
    feed._should_stop = lambda: rank == 1
    return feed.before_step(0)


def test_one_rank_that_is_asked_to_stop_stops_all(tmp_path):
    assert run_ranks(stop_on_ranks, 2, tmp_path) == [True, True]


def work_of_steps(rank, run):
    """What the loop's own thread does in steps that swap and in others: files it opens, messages it exchanges."""
    feed, swaps, others = open_feed(run, rank), [], []
    loop, opened, exchanged = threading.get_ident(), [], []

    def hear(event, arguments):
        if event == "open" and threading.get_ident() == loop:
            opened.append(str(arguments[0]))

    sys.addaudithook(hear)
    all_max = World.all_max
    World.all_max = lambda world, values: exchanged.append(len(values)) or all_max(world, values)
    for version in range(6):
        if rank == 0 and version:
            publish(run, version)
        deadline = time.monotonic() + 20
        while feed.in_force is None or feed.in_force.version != version:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            before = feed.in_force
            opened.clear(), exchanged.clear()
            feed.before_step(version)
            (others if feed.in_force is before else swaps).append((sorted(opened), list(exchanged)))
    feed.close()
    return swaps[1:], others  # the first is waited for


def test_a_step_that_swaps_does_no_more_than_any_other(tmp_path):
    """What a version costs, to hash and to map it, is the background thread's."""
    publish(tmp_path, 0)
    for rank, (swaps, others) in enumerate(run_ranks(work_of_steps, 2, tmp_path)):
        assert len(swaps) == 5 and len(others) > 5
        latest = [str(negatives_folder(tmp_path) / "LATEST")] if rank == 0 else []
        assert all(step == (latest, [4]) for step in (*swaps, *others)), (swaps, others)
