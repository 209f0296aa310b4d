"""Passages of an earlier checkpoint: frozen, or as long as they have not moved."""

import numpy as np
import pytest

from mining.find.base import Base, drift_sample, earlier_base, keep_base, mean_drift
from tests.mining.run import make_job, publish_checkpoint, published
from tests.mining.test_service import folder, manifest, mine

SMALL = {"bm25_top_k": 0}


def num_shards(job):
    return len(list(folder(job).glob("shards/*/shard-*")))


def test_frozen_passages_are_encoded_once_and_queries_each_time(tmp_path):
    job = make_job(tmp_path, mine={**SMALL, "passages": "frozen"})
    fresh = make_job(tmp_path, run="fresh", mine=SMALL)
    for step in (10, 20):
        for one in (job, fresh):
            publish_checkpoint(one, step)
            mine(one)
    assert [manifest(job, f"v00000{v}")["passages"]["checkpoint_step"] for v in (1, 2)] == [10, 10]
    assert [manifest(fresh, f"v00000{v}")["passages"]["checkpoint_step"] for v in (1, 2)] == [10, 20]
    frozen, anew = published(job), published(fresh)
    assert frozen["v000001/ids.npy"] == anew["v000001/ids.npy"] and frozen["v000002/ids.npy"] != anew["v000002/ids.npy"]
    assert num_shards(fresh) - num_shards(job) == 4  # those of the passages of step 20


@pytest.mark.parametrize("max_drift, expected", [(0.0, 20), (2.0, 10)])
def test_passages_are_encoded_anew_when_they_have_drifted(tmp_path, max_drift, expected):
    job = make_job(tmp_path, mine={**SMALL, "passages": "drift", "max_drift": max_drift})
    for step in (10, 20):
        publish_checkpoint(job, step)
        mine(job)
    first, second = (manifest(job, f"v00000{v}")["passages"] for v in (1, 2))
    assert first["drift"] is None and 0.001 < second["drift"] < 2
    assert (first["checkpoint_step"], second["checkpoint_step"]) == (10, expected)


def test_drift_is_one_minus_the_mean_cosine():
    old = np.array([[1, 0], [0, 2], [3, 0]], np.float32)
    assert mean_drift(old, old) == pytest.approx(0) and mean_drift(old, np.array([[0, 1], [0, 5], [-1, 0]])) == pytest.approx(1)


def test_the_sample_is_a_hundredth_and_always_the_same():
    rows = drift_sample(50_000, 7)
    assert len(np.unique(rows)) == 500 and (rows == drift_sample(50_000, 7)).all() and (rows != drift_sample(50_000, 8)).any()
    assert drift_sample(20, 7).tolist() == list(range(20))


def test_a_version_made_again_has_the_base_it_had(tmp_path):
    first, second = Base(1, "a", 10), Base(2, "b", 20)
    keep_base(tmp_path, first)
    keep_base(tmp_path, second)
    assert earlier_base(tmp_path, 2) == first and earlier_base(tmp_path, 3) == second and earlier_base(tmp_path, 1) is None
    keep_base(tmp_path, Base(2, "c", 30))
    assert earlier_base(tmp_path, 3).weights_digest == "c" and earlier_base(tmp_path, 2) == first
