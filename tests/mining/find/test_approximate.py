"""Approximate search: the same bytes for every number of ranks, whatever repeats, and what it finds."""

import re

import faiss
import numpy as np
import pytest
import torch

from mining.find import approximate
from mining.find.entries import Entries
from mining.find.index import empty_index
from mining.find.on_gpu import nearest_by_product
from mining.find.rates import clustered
from mining.table.audit import recall_of_each
from tests.mining.find.texts import DEVICE, NUM_PASSAGES, NUM_QUERIES, SHARD_ROWS, Corpus, Table
from trainer.encoder.topk import best_of_keys

KINDS = ["IVF16,Flat", "IVF16,SQ8", "IVF16,PQ6", "PCA12,IVF16,Flat", "IVF16,PQ12x4fs", "IVF16_HNSW8,Flat"]
K = 20


@pytest.fixture(scope="module")
def corpus():
    return Corpus()


@pytest.fixture(scope="module")
def states(corpus):
    """Return the trained state of a kind, as bytes."""
    kept = {}

    def state(factory):
        if factory not in kept:
            kept[factory] = faiss.serialize_index(corpus.train(factory))
        return faiss.deserialize_index(kept[factory])

    return state


def found_by_ranks(corpus, states, factory, num_ranks, seed, entries=None, tile=70, k=K, nprobe=4):
    """Return (scores, ids) of all queries, tile by tile, as the retriever joins the keys of ranks."""
    shares = corpus.shares(num_ranks, seed)
    finders = [corpus.finder(factory, states(factory), k, nprobe, shards, entries) for shards in shares]
    tiles = [slice(start, min(start + tile, NUM_QUERIES)) for start in range(0, NUM_QUERIES, tile)]
    joined = [best_of_keys([finder.keys(places) for finder in finders], finders[0].depth) for places in tiles]
    return tuple(np.concatenate(part) for part in zip(*joined, strict=True))


@pytest.mark.parametrize("factory", KINDS)
def test_ranks_and_tiles_change_no_byte_although_texts_repeat(corpus, states, factory):
    one = found_by_ranks(corpus, states, factory, 1, 0, tile=NUM_QUERIES)
    assert (one[1][:, :K] >= 0).mean() > 0.9 and corpus.allowed_N[one[1][one[1] >= 0]].all()
    for num_ranks, seed, tile in ((1, 1, 70), (2, 2, 256), (3, 3, 33)):
        other = found_by_ranks(corpus, states, factory, num_ranks, seed, tile=tile)
        np.testing.assert_array_equal(other[1], one[1])
        assert other[0].tobytes() == one[0].tobytes()


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,PQ6"])
def test_without_asking_again_the_ranks_would_show(corpus, states, factory, monkeypatch):
    """The test above can fail: with an entry for every passage, equal scores are cut at random."""
    monkeypatch.setattr(Entries, "are_settled", lambda self, scores, ids, depth: np.ones(len(ids), bool))
    everyone = Entries(corpus.allowed_N)
    one, two = (found_by_ranks(corpus, states, factory, n, n, entries=everyone)[1] for n in (1, 2))
    assert (one != two).any(1).mean() > 0.02
    one, two = (found_by_ranks(corpus, states, factory, n, n)[1] for n in (1, 2))
    np.testing.assert_array_equal(one[one != two], np.zeros(0))  # repeats alone are what shows, and entries have none


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8"])
def test_an_entry_for_each_text_finds_what_an_entry_for_each_passage_finds(corpus, states, factory):
    by_text, by_passage = (found_by_ranks(corpus, states, factory, 2, 5, each) for each in (None, Entries(corpus.allowed_N)))
    for found, wanted in zip(by_text, by_passage, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "IVF16,SQ8,RFlat", "IVF16,SQ8,Refine(SQfp16)"])
def test_looking_into_all_lists_finds_what_exact_search_finds(corpus, states, factory):
    finder = corpus.finder(factory, states(factory), K, 16, range(corpus.num_shards))
    exact = corpus.exact(K)
    found = best_of_keys([finder.keys(slice(0, NUM_QUERIES))], finder.depth)[1]
    assert recall_of_each(found, exact).min() == 1 and (found[:, :K] == exact).mean() > 0.5
    assert finder.depth == (K if factory.endswith(",Flat") else 2 * K) and finder.is_exact == (factory == "IVF16,Flat")


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "OPQ2_16,IVF16,SQ8", "IVF16,SQ8,RFlat", "HNSW8"])
def test_nprobe_decides_how_much_is_found_behind_rotations_and_before_refinement(corpus, states, factory):
    finder, exact, recalls = corpus.finder(factory, states(factory), K, 1, range(corpus.num_shards)), corpus.exact(K), []
    for nprobe in (1, 4, 1000):
        finder.set_nprobe(nprobe)
        recalls.append(recall_of_each(best_of_keys([finder.search(corpus.queries.embedding_QD)], finder.depth)[1], exact).mean())
    assert finder.nprobe == min(1000, finder.most_nprobe)
    assert recalls == sorted(recalls) and recalls[2] > 0.95 and (recalls[0] < 0.9 or factory == "HNSW8")


def test_more_neighbours_than_passages_leave_empty_places(corpus, states):
    allowed_N = np.zeros(NUM_PASSAGES, bool)
    allowed_N[[3, 120, 1999]] = True
    scores, ids = found_by_ranks(corpus, states, "IVF16,Flat", 3, 0, Entries(allowed_N), k=30, nprobe=16)
    assert [set(row[:3]) for row in ids.tolist()] == [{3, 120, 1999}] * NUM_QUERIES
    assert (ids[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()
    everything = found_by_ranks(corpus, states, "IVF16,SQ8", 2, 0, k=NUM_PASSAGES, nprobe=16)[1]
    assert ((everything >= 0).sum(1) == corpus.allowed_N.sum()).all()


def test_threads_change_no_byte(corpus, states, monkeypatch):
    one = found_by_ranks(corpus, states, "IVF16,Flat", 1, 0)
    monkeypatch.setattr(approximate.torch, "get_num_threads", lambda: 3)
    faiss.omp_set_num_threads(3)
    try:
        many = found_by_ranks(corpus, states, "IVF16,Flat", 1, 0)
    finally:
        faiss.omp_set_num_threads(1)
    assert [part.tobytes() for part in many] == [part.tobytes() for part in one]


def test_one_index_over_a_shuffled_corpus_finds_more_than_one_for_each_block_at_equal_work():
    num, k, blocks = 16384, 10, 16
    passage_ND, query_QD = clustered(num, 32, num_clusters=300), clustered(128, 32, seed=1, num_clusters=300)
    table, everyone = Table(query_QD), Entries(np.ones(num, bool))
    exact = np.argsort(-(query_QD @ passage_ND.T), axis=1)[:, :k]

    def recall(parts, lists, nprobe):
        keys = []
        for rows in parts:
            index = empty_index(f"IVF{lists},Flat", 32)
            index.train(passage_ND[rows])
            finder = approximate.ApproximateFinder(f"IVF{lists},Flat", index, everyone, table, k, num // blocks, DEVICE)
            for block in np.unique(rows // (num // blocks)).tolist():
                finder.see(block, passage_ND[block * (num // blocks) : (block + 1) * (num // blocks)])
            finder.set_nprobe(nprobe)
            keys.append(finder.search(query_QD))
        return recall_of_each(best_of_keys(keys, k)[1], exact).mean()

    one = recall([np.arange(num)], 256, 16)  # a sixteenth of all passages is looked at, and a sixteenth of each block
    of_blocks = recall(np.split(np.arange(num), blocks), 16, 1)
    assert one > 0.75 and one > of_blocks + 0.2, (one, of_blocks)


def test_a_shard_is_added_once_and_before_the_first_query(corpus, states):
    finder = corpus.finder("IVF16,Flat", states("IVF16,Flat"), K, 4, [2])
    for shard in (2, 3):
        with pytest.raises(AssertionError, match=re.escape(f"shard {shard} is added twice, or after the first query")):
            finder.see(shard, corpus.passage_ND[:SHARD_ROWS])


def test_products_choose_the_lists_that_faiss_chooses(corpus, states):
    """A GPU chooses by these products; here they run on the CPU."""
    index, passage_nD = states("IVF16,Flat"), corpus.passage_ND[:300]
    centroid_LD = torch.from_numpy(index.quantizer.reconstruct_n(0, 16))
    wanted = index.quantizer.search(passage_nD, 1)[1][:, 0]
    for stored in (torch.float32, torch.float16):
        found = nearest_by_product(torch.from_numpy(passage_nD).to(stored), centroid_LD, 128).numpy()
        assert (found != wanted).sum() <= (0 if stored == torch.float32 else 3)  # float16 moves who stands between two
