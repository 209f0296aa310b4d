"""A search that is cut: into passes over the passages, and into tiles of queries. It changes no byte."""

from dataclasses import replace

import pytest

from mining.find import source
from mining.find.dense_search import DenseSearch
from tests.mining.run import make_job, publish_checkpoint, published
from tests.mining.test_service import mine
from trainer.encoder import topk

KINDS = {
    "exact": {"search": {"top_k": 30, "bm25_top_k": 5}, "sample": {"num_negatives": 5, "random_share": 0.4}},
    "index": {"index": {"factory": "IVF8,SQ8"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_queries_that_are_searched_in_passes_get_the_same_negatives(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(topk, "TILE_SCORES", 64 * 4096)  # the plan cuts at whole tiles
    plain, replayed = source.plan_memory, []
    jobs = [make_job(tmp_path, run=name, mine={"bm25_top_k": 0}, **KINDS[kind]) for name in ("at once", "in passes")]
    for job in jobs:
        publish_checkpoint(job, 10)
    mine(jobs[0])
    monkeypatch.setattr(source, "plan_memory", lambda *how: replace(plain(*how), query_pass=64, query_tile=32))
    replay = DenseSearch.replay
    monkeypatch.setattr(DenseSearch, "replay", lambda self, looks: replayed.append(len(looks)) or replay(self, looks))
    mine(jobs[1])
    # 225 queries are four passes. The first goes with the stream; known pairs are looked for in each, the best by exact search.
    assert replayed == ([2, 2, 2] if kind == "exact" else [1, 1, 1, 1])
    assert published(jobs[1]) == published(jobs[0]) and len(published(jobs[0])["v000001/ids.npy"]) > 1000
