"""Indexes of one shard against exact search over all passages."""

import numpy as np
import pytest

from mining.audit import recall_of_each
from mining.index import IndexSettings, build_indexes
from trainer.encoder.topk import merge_top_k, top_k
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


def normal(num_rows, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(num_rows, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def search(table, allowed, k, **settings):
    indexes = build_indexes(IndexSettings(**settings), table, range(5), allowed, device=0)
    return merge_top_k([index.search(normal(40, 1), k) for index in indexes], k)


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


def test_a_shard_too_small_to_train_is_searched_exactly_and_that_is_said(caplog):
    search(Table(), np.ones(NUM_PASSAGES, bool), 5, factory="IVF64,Flat")
    assert "1 of 5 shards are too small to train IVF64,Flat" in caplog.text


def test_what_is_no_factory_string_is_refused():
    with pytest.raises(InputError, match=r"index\.factory='IFV8' is not a FAISS index"):
        search(Table(), np.ones(NUM_PASSAGES, bool), 5, factory="IFV8")
