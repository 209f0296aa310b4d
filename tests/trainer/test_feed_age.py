"""Negatives that are too old, or that hurt: what a step draws from, and what comes back."""

import time

import numpy as np
import pytest

from tests.trainer.worlds import world_of
from trainer.errors import InputError
from trainer.feed import NegativesFeed
from trainer.handoff.manifest import is_pinned
from trainer.handoff.negatives import Negatives, negatives_folder, publish_negatives, version_name
from trainer.handoff.settings import NegativesSettings
from trainer.job import CheckpointSettings, TrainJob

NUM_QUERIES, NUM_PASSAGES = 4, 9


def publish(run, version, mined_at):
    ids = np.arange(NUM_QUERIES) + version
    publish_negatives(run, version, np.arange(NUM_QUERIES + 1), ids, np.zeros(NUM_QUERIES), {"checkpoint_step": mined_at})


def feed_of(run, given=None, **settings):
    return NegativesFeed(
        world_of(), run, NegativesSettings(**settings), NUM_QUERIES, NUM_PASSAGES, should_stop=lambda: False, given=given
    )


def until(feed, step, version):
    """Take steps' turns until a version is in force; a step does not wait for it."""
    for _ in range(200):
        feed.before_step(step)
        if feed.in_force is not None and feed.in_force.version == version:
            return
        time.sleep(0.05)
    pytest.fail(f"version {version} never came")


def test_old_negatives_are_said_once_and_used_or_not(tmp_path, caplog):
    publish(tmp_path, 0, mined_at=10)
    for how, is_used in (("warn", True), ("fallback", False)):
        feed = feed_of(tmp_path, max_age_steps=20, when_stale=how)
        until(feed, 30, 0)
        assert feed.of_step(30) is feed.in_force
        caplog.clear()
        for step in (31, 32):
            assert (feed.of_step(step) is feed.in_force) == is_used and (feed.of_step(step) is None) != is_used
        assert caplog.text.count("negatives v0 are older than negatives.max_age_steps=20") == 1
        feed.close()


def test_younger_negatives_are_waited_for_and_not_for_ever(tmp_path):
    publish(tmp_path, 0, mined_at=10)
    feed = feed_of(tmp_path, max_age_steps=20, when_stale="wait", first_wait_s=1.0)
    until(feed, 30, 0)
    waits = []

    def on_wait():
        waits.append(1)
        if len(waits) == 2:
            publish(tmp_path, 1, mined_at=30)

    feed.before_step(31, on_wait)
    assert feed.in_force.version == 1 and len(waits) >= 2
    waits.clear()
    feed.before_step(60, lambda: waits.append(1))  # nothing comes: first_wait_s, and then on
    assert feed.in_force.version == 1 and waits
    feed.close()


def test_what_hurt_is_taken_back_and_never_used_again(tmp_path):
    publish(tmp_path, 0, mined_at=0)
    feed = feed_of(tmp_path)
    until(feed, 0, 0)
    publish(tmp_path, 1, mined_at=5)
    until(feed, 6, 1)
    folder = negatives_folder(tmp_path)
    assert is_pinned(folder / version_name(0)), "kept until the next swap: it may come back"
    feed.take_back(1, 0)
    assert feed.of_step(7).version == 0
    assert feed.before_step(7) is False and feed.of_step(7).version == 0
    publish(tmp_path, 2, mined_at=10)
    until(feed, 11, 2)
    feed.close()
    assert not any(is_pinned(folder / version_name(version)) for version in range(3))
    again = feed_of(tmp_path)
    again.take_back(2, None)
    assert again.before_step(12) is False
    assert again.in_force is None and again.of_step(12) is None
    again.take_back(2, 1)
    until(again, 13, 1)  # after a restart it is opened like any other
    again.close()


def test_negatives_of_the_data_serve_until_some_are_mined(tmp_path):
    given = Negatives(np.arange(NUM_QUERIES + 1), np.zeros(NUM_QUERIES, np.int64), np.zeros(NUM_QUERIES, np.float32), -1, {})
    feed = feed_of(tmp_path, given)
    waits = []
    feed.before_step(0, lambda: waits.append(1))
    assert not waits and feed.of_step(0) is given
    publish(tmp_path, 0, mined_at=None)
    until(feed, 1, 0)
    assert feed.of_step(10**6).version == 0, "BM25's have no age"
    feed.close()


def test_settings_that_would_wait_for_ever_are_refused():
    with pytest.raises(InputError, match="would wait for checkpoints that are not written yet; set it to 400 or more"):
        TrainJob(
            negatives=NegativesSettings(max_age_steps=300, when_stale="wait"), checkpoint=CheckpointSettings(every_steps=200)
        )
