"""A machine without FAISS mines by exact search, clusters included, and is told by name what else would need it."""

import sys

import numpy as np
import pytest

from mining.table.clusters import ITERATIONS, POINTS_PER_CENTROID, k_means
from tests.mining.run import make_job, publish_checkpoint, published
from tests.mining.services import start_service


def hide_faiss(rank: int) -> None:
    """Have every import of FAISS fail, as where it is not installed."""
    sys.modules["faiss"] = None  # type: ignore[assignment]


def test_exact_search_and_clusters_need_none(tmp_path):
    job = make_job(tmp_path, num_queries=60, clusters={"num": 4})
    publish_checkpoint(job, 10)
    service = start_service(job, before=hide_faiss)
    assert service.wait() == 0, service.said
    assert {"v000001/ids.npy", "v000001/clusters.npy"} < published(job).keys()


@pytest.mark.parametrize("factory", ["IVF8,Flat", "auto"])
def test_another_index_is_refused_before_anything_is_made(tmp_path, factory):
    job = make_job(tmp_path, num_queries=60, index={"factory": factory})
    service = start_service(job, before=hide_faiss)
    assert service.wait() == 2 and "Traceback" not in service.said
    assert f"index.factory='{factory}' needs FAISS" in service.said and "pip install 'negpool[faiss]'" in service.said
    assert not published(job)


def test_k_means_is_as_good_as_that_of_faiss():
    faiss = pytest.importorskip("faiss")
    num, width = 12, 16
    point_nD = np.random.default_rng(0).standard_normal((3000, width), np.float32)

    class Table:
        def read(self, rows):
            return point_nD[rows]

    def distortion(cluster_n):
        return sum(((point_nD[cluster_n == c] - point_nD[cluster_n == c].mean(0)) ** 2).sum() for c in range(num))

    theirs = faiss.Kmeans(width, num, niter=ITERATIONS, seed=0, max_points_per_centroid=POINTS_PER_CENTROID)
    theirs.train(point_nD)
    wanted = distortion(theirs.index.search(point_nD, 1)[1][:, 0])
    found = distortion(k_means(Table(), np.arange(3000), num, 0))
    in_one = ((point_nD - point_nD.mean(0)) ** 2).sum()
    assert found < 1.01 * wanted < 0.9 * in_one  # random points have many optima of about the same worth
