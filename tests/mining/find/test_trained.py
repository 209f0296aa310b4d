"""Trained states of a run: taken over, torn, of something else, and judged."""

import numpy as np
import pytest

from mining.find.rates import clustered
from mining.find.trained import FILE, MEASURED, Trained, TrainedStates, sample_rows, train_index, unevenness
from tests.mining.find.texts import DEVICE
from trainer.handoff.manifest import TornVersion

ABOUT = {"factory": "IVF8,SQ8", "width": 16, "data": "d" * 8}


@pytest.fixture(scope="module")
def index():
    return train_index("IVF8,SQ8", clustered(600, 16), DEVICE)


def states(tmp_path, version, **about):
    return TrainedStates(tmp_path, version, ABOUT | about)


def test_a_version_takes_the_state_of_an_earlier_one_and_a_restart_the_same(tmp_path, index):
    assert states(tmp_path, 3).find() is None
    first = states(tmp_path, 3).publish(index)
    assert first.version == 3 and [states(tmp_path, v).find() for v in (2, 3, 4)] == [None, first, first]
    opened = states(tmp_path, 4).open(first)
    x = clustered(50, 16, seed=1)
    assert opened.ntotal == 0 and opened.is_trained
    np.testing.assert_array_equal(opened.sa_encode(x), index.sa_encode(x))


def test_a_torn_state_is_said_and_another_one_takes_its_place(tmp_path, index, caplog):
    states(tmp_path, 1).publish(index)
    second = states(tmp_path, 2).publish(index)
    file = tmp_path / "index" / "v000002" / FILE
    file.write_bytes(file.read_bytes()[:-7])
    assert states(tmp_path, 2).find().version == 1 and f"version 2 cannot be used: {file}" in caplog.text
    with pytest.raises(TornVersion):
        states(tmp_path, 2).open(second)
    assert states(tmp_path, 2).publish(index) == states(tmp_path, 2).find() == second


@pytest.mark.parametrize("other", [{"factory": "IVF9,SQ8"}, {"width": 17}, {"data": "other"}], ids=str)
def test_a_state_of_something_else_is_said_and_not_taken(tmp_path, index, caplog, other):
    states(tmp_path, 1, **other).publish(index)
    assert states(tmp_path, 2).find() is None
    ((key, value),) = other.items()
    assert f"state of version 1 is of something else: {key} is {value!r} there and {ABOUT[key]!r} here" in caplog.text
    assert states(tmp_path, 1).publish(index) == states(tmp_path, 1).find()  # it takes the place of the other


def test_a_state_that_another_rank_has_not_seen_is_refused(tmp_path, index):
    found = states(tmp_path, 1).publish(index)
    with pytest.raises(TornVersion, match="is another one than rank 0 has found"):
        states(tmp_path, 1).open(Trained(1, found.digest[::-1]))


@pytest.mark.parametrize("measured", [(2.5, 8), (1.2, 32)])
def test_lists_grown_uneven_or_needed_more_often_are_trained_anew_in_the_next_version(tmp_path, index, measured, caplog):
    caplog.set_level("INFO")
    first = states(tmp_path, 1).publish(index)
    states(tmp_path, 1).settle(first, 1.2, 8)
    states(tmp_path, 2).settle(first, 2.3, 16)  # within both limits
    assert states(tmp_path, 3).find() == first
    states(tmp_path, 3).settle(first, *measured)
    assert "the next version trains its own" in caplog.text
    assert states(tmp_path, 3).find() == first and states(tmp_path, 4).find() is None  # a restart of 3 takes the same
    second = states(tmp_path, 4).publish(index)
    states(tmp_path, 4).settle(second, 1.2, 8)
    assert states(tmp_path, 5).find() == second
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [MEASURED, "v000004"]


def test_the_sample_is_drawn_by_the_row_and_is_all_where_there_are_few(monkeypatch):
    draw = np.random.default_rng(0)
    is_entry_N = draw.random(20_000) < 0.8
    rows = sample_rows(is_entry_N, 4000, 7)
    assert is_entry_N[rows].all() and (np.diff(rows) > 0).all() and 3700 < len(rows) < 4300
    assert len(np.intersect1d(rows, sample_rows(is_entry_N, 4000, 8))) < 1200
    monkeypatch.setattr("mining.find.trained.BLOCK_ROWS", 333)
    np.testing.assert_array_equal(sample_rows(is_entry_N, 4000, 7), rows)
    np.testing.assert_array_equal(sample_rows(is_entry_N, 10**9, 7), np.flatnonzero(is_entry_N))


def test_unevenness_is_that_of_faiss():
    assert unevenness(np.array([5, 5, 5])) == 1 and unevenness(np.array([9, 0, 0])) == 3 and unevenness(np.zeros(4)) == 0
