"""Indexes of one block of shards against exact search over all passages."""

import numpy as np
import pytest
import torch

from mining.find.centroids import Centroids
from mining.find.index import build_indexes, bytes_of_passage
from mining.settings import IndexSettings
from mining.table.audit import recall_of_each
from trainer.encoder.topk import BestOf, best_of_keys, top_k
from trainer.errors import InputError

SHARD_ROWS, NUM_PASSAGES, WIDTH = 100, 450, 16


class Table:
    """Embeddings in memory, cut into shards as those on disk are."""

    def __init__(self):
        self.passage_ND = normal(NUM_PASSAGES)
        self.shards = self

    def rows(self, shard):
        return np.arange(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, NUM_PASSAGES))

    def shard(self, shard):
        return self.passage_ND[self.rows(shard)]

    def let_go(self, shard):
        pass

    def block(self, block):
        return [block]


def normal(num_rows, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(num_rows, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class NoCentroids:
    def of_shard(self, shard):
        return None

    def keep(self, shard, centroid_KD):
        pass


def search(table, allowed, k, centroids=NoCentroids(), **settings):  # noqa: B008
    best = BestOf(normal(40, 1), k)
    for index in build_indexes(IndexSettings(**settings), table, range(5), allowed, torch.device("cpu"), k, centroids):
        index.search_into(best)
    return best_of_keys([best.keys()], k)


@pytest.mark.parametrize("factory", ["exact", "Flat", "IVF8,Flat"])
def test_indexes_that_look_everywhere_find_what_exact_search_finds(factory):
    table, allowed = Table(), np.random.default_rng(2).random(NUM_PASSAGES) < 0.7
    scores, ids = search(table, allowed, 20, factory=factory, nprobe=8)
    expected_scores, expected_ids = top_k(normal(40, 1), table.passage_ND, 20, allowed_N=allowed)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)  # two libraries add in different orders
    assert allowed[ids].all() and ids.dtype == np.int64 and scores.dtype == np.float32


@pytest.mark.parametrize("factory", ["exact", "Flat", "IVF8,Flat"])
def test_more_neighbours_than_passages_leave_empty_places(factory):
    allowed = np.zeros(NUM_PASSAGES, bool)
    allowed[[3, 120, 449]] = True  # shards without any allowed passage among them
    scores, ids = search(Table(), allowed, 10, factory=factory)
    assert [set(row[:3]) for row in ids.tolist()] == [{3, 120, 449}] * 40
    assert (ids[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()


def test_nprobe_decides_how_much_an_ivf_index_finds():
    table, allowed = Table(), np.ones(NUM_PASSAGES, bool)
    exact = search(table, allowed, 20)[1]
    recalls = [recall_of_each(search(table, allowed, 20, factory="IVF8,Flat", nprobe=n)[1], exact).mean() for n in (1, 4, 8)]
    assert recalls[0] < 0.9 and recalls[0] < recalls[1] < recalls[2] == 1


def test_a_block_too_small_to_train_is_searched_exactly_and_that_is_said(caplog):
    search(Table(), np.ones(NUM_PASSAGES, bool), 5, factory="IVF64,Flat")
    assert "1 of 5 blocks are too small to train IVF64,Flat" in caplog.text


def test_what_is_no_factory_string_is_refused():
    with pytest.raises(InputError, match=r"index\.factory='IFV8' is not a FAISS index"):
        search(Table(), np.ones(NUM_PASSAGES, bool), 5, factory="IFV8")


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,SQ8"])
def test_kept_centroids_give_the_index_that_trained_them(tmp_path, factory):
    table, allowed = Table(), np.ones(NUM_PASSAGES, bool)
    first = search(table, allowed, 20, Centroids(tmp_path, 1, factory, SHARD_ROWS), factory=factory, nprobe=1)
    warm = Centroids(tmp_path, 2, factory, SHARD_ROWS)
    assert warm.source == 1 and warm.of_shard(3).shape[1] == WIDTH
    again = search(table, allowed, 20, warm, factory=factory, nprobe=1)
    np.testing.assert_array_equal(again[1], first[1])
    assert not list((tmp_path / "centroids").glob("*/v000002"))  # nothing was trained


def test_other_passages_are_found_from_the_centroids_of_the_last_version(tmp_path):
    factory, allowed = "IVF8,Flat", np.ones(NUM_PASSAGES, bool)
    search(Table(), allowed, 20, Centroids(tmp_path, 1, factory, SHARD_ROWS), factory=factory, nprobe=1)
    moved = Table()
    moved.passage_ND = -moved.passage_ND[::-1]
    found = [
        search(moved, allowed, 20, Centroids(tmp_path, 2, factory, SHARD_ROWS, anew), factory=factory, nprobe=1)[1]
        for anew in (False, True)
    ]
    assert (found[0] != found[1]).any()  # the old cells are other cells
    assert Centroids(tmp_path, 3, factory, SHARD_ROWS).source == 2


def test_an_index_takes_the_bytes_that_are_planned():
    import faiss

    for factory in ("Flat", "IVF8,Flat", "IVF8,SQ8", "HNSW16"):
        index = faiss.index_factory(WIDTH, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(normal(4000))
        index.add(normal(4000))
        held = len(faiss.serialize_index(index)) / 4000 + 8  # and our ids
        assert held <= bytes_of_passage(factory, WIDTH) <= 1.4 * held, factory  # with room to grow
    assert bytes_of_passage("exact", WIDTH) == 0
