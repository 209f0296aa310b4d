"""Candidates and scores of a tile of queries, on ranks that own the shards in any way, against all products in float64."""

import numpy as np
import pytest

from mining.find.known_pairs import Listed, known_before
from mining.find.retrieve import DenseRetriever
from mining.find.search import ExactFinder, best_of_ranks, share_of
from mining.settings import SampleSettings
from tests.mining.find.world import NUM_PASSAGES, NUM_QUERIES, SHARD_ROWS, judgements
from tests.mining.threads import on_threads
from trainer.encoder.topk import best_of_keys

JUDGED, TOP_K, TILE = judgements(), 12, 64
RNG = np.random.default_rng(6)
WORDS = np.stack([RNG.permutation(np.flatnonzero(JUDGED.allowed_N))[:5] for _ in range(NUM_QUERIES)])
OTHERS = RNG.integers(-1, NUM_PASSAGES, (NUM_QUERIES, 3))


class Coarse(ExactFinder):
    """A search by rounded embeddings, as a quantised index does it; it finds more than are wanted."""

    is_exact = False

    def __init__(self, places, query_QD, k, *rest):
        super().__init__(places, query_QD, 2 * k, *rest)

    def see(self, shard, vectors):
        super().see(shard, np.round(16 * np.asarray(vectors, np.float32)) / 16)


def exact_finder(world, ranks, owners, kind=ExactFinder, places=slice(0, NUM_QUERIES)):
    finder = kind(places, world.stored_queries(places), TOP_K, SHARD_ROWS, JUDGED.allowed_N, "cpu")
    world.stream(ranks, owners, finder)
    return finder


def retriever(world, ranks, owners, kind=ExactFinder, words=None):
    sources = known_before(JUDGED, SampleSettings(), 0, 1, None, words)
    parts = exact_finder(world, ranks, owners, kind), world.known(ranks, owners, sources), world.asker(ranks, owners)
    return DenseRetriever(ranks, JUDGED, *parts, TOP_K, words)


def on_ranks(world, num_ranks, ask, **how):
    """Return what `ask` returns of each share of each tile, joined over shares and tiles; ask: takes retriever, tile, share."""
    owners = world.owners(num_ranks, num_ranks)

    def go(ranks):
        dense, found = retriever(world, ranks, owners, **how), []
        for start in range(0, NUM_QUERIES, TILE):
            tile = slice(start, min(start + TILE, NUM_QUERIES))
            share = share_of(tile.stop - tile.start, ranks.rank, ranks.num_ranks)
            found.append(ask(dense, tile, slice(start + share.start, start + share.stop)))
        return found

    of_rank = on_threads(num_ranks, go)
    of_share = [found for tile in zip(*of_rank, strict=True) for found in tile]
    return [np.concatenate([part for part in column if len(part)]) for column in zip(*of_share, strict=True)]


def best_in_float64(world, allowed_N):
    order = np.argsort(np.where(allowed_N, -world.exact, np.inf), axis=1, kind="stable")
    return order[:, :TOP_K]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_best_of_all_shards_are_found_in_any_pass(world, num_ranks):
    owners, expected = world.owners(num_ranks), best_in_float64(world, JUDGED.allowed_N)
    for places in (slice(0, NUM_QUERIES), slice(41, 130)):

        def go(ranks, places=places):
            finder = exact_finder(world, ranks, owners, places=places)
            return best_of_ranks(ranks, finder, slice(50, 127))

        scores, ids = (np.concatenate(column) for column in zip(*on_threads(num_ranks, go), strict=True))
        found = np.take_along_axis(world.exact[50:127], ids, 1)
        np.testing.assert_allclose(found, np.take_along_axis(world.exact[50:127], expected[50:127], 1), atol=1e-6)
        np.testing.assert_allclose(scores, found, atol=1e-6)
        order = np.lexsort((ids, -scores))
        assert (order == np.arange(TOP_K)).all(), "equal texts, of which there are many, stand by their id"
        assert JUDGED.allowed_N[ids].all() and (np.diff(np.sort(ids), axis=1) > 0).all()


def test_a_shard_that_is_seen_twice_is_noticed(world):
    def go(ranks):
        finder = exact_finder(world, ranks, world.owners(1))
        if ranks.num_ranks == 1:
            finder.see(0, world.passages.shard(0))
        best_of_ranks(ranks, finder, slice(0, NUM_QUERIES))

    with pytest.raises(AssertionError, match="shard 0 is searched twice"):
        on_threads(1, go)

    def both(ranks):
        finder = exact_finder(world, ranks, np.full(8, ranks.rank))
        best_of_ranks(ranks, finder, slice(0, NUM_QUERIES))

    with pytest.raises(AssertionError, match="a passage was found twice"):
        on_threads(2, both)


@pytest.mark.parametrize("kind", [ExactFinder, Coarse])
def test_ranks_and_owners_change_no_bit_of_what_is_found(world, kind):
    one, two, three = (on_ranks(world, n, lambda dense, tile, _: dense.find(tile), kind=kind) for n in (1, 2, 3))
    for scores_and_ids in zip(one, two, three, strict=True):
        assert len({found.tobytes() for found in scores_and_ids}) == 1
    scores, ids = one
    assert scores.shape == ids.shape == (NUM_QUERIES, TOP_K)
    np.testing.assert_allclose(scores, np.take_along_axis(world.exact, ids, 1), atol=1e-6)
    assert (np.lexsort((ids, -scores)) == np.arange(TOP_K)).all()


def test_candidates_of_an_approximate_search_are_ranked_by_their_exact_scores(world):
    _, ids = on_ranks(world, 2, lambda dense, tile, _: dense.find(tile), kind=Coarse)

    def go(ranks):
        return best_of_keys([exact_finder(world, ranks, world.owners(1), Coarse).keys(slice(0, NUM_QUERIES))], 2 * TOP_K)[1]

    candidates = on_threads(1, go)[0]
    scores = np.take_along_axis(world.exact, candidates, 1).astype(np.float32)
    for query, row in enumerate(ids):
        best = sorted(zip(-scores[query], candidates[query], strict=True))[:TOP_K]
        np.testing.assert_allclose([-score for score, _ in best], world.exact[query, row], atol=1e-6)
        assert set(row) <= set(candidates[query])
    assert (ids[:, 1:] != candidates[:, 1:TOP_K]).any(), "rounded scores have another order"


@pytest.mark.parametrize("kind", [ExactFinder, Coarse])
def test_candidates_of_words_are_added_and_scored_by_the_encoder(world, kind):
    plain = on_ranks(world, 1, lambda dense, tile, _: dense.find(tile), kind=kind)[1]
    words = Listed(np.arange(NUM_QUERIES + 1) * 5, WORDS.ravel())
    one, three = (on_ranks(world, n, lambda dense, tile, _: dense.find(tile), kind=kind, words=words) for n in (1, 3))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, three, strict=True))
    for query, (scores, ids) in enumerate(zip(*one, strict=True)):
        row = ids[ids >= 0]
        assert set(row) == {*plain[query], *WORDS[query]} and len(set(row)) == len(row)
        np.testing.assert_allclose(scores[: len(row)], world.exact[query, row], atol=1e-6)
        assert (np.lexsort((row, -scores[: len(row)])) == np.arange(len(row))).all()


def test_any_pair_is_scored_alike_known_or_not(world):
    def ask(dense, tile, places):
        dense.find(tile)
        after = dense.score(places, OTHERS[places])
        return after, dense.score_positives(places)

    one, two, three = (on_ranks(world, n, ask) for n in (1, 2, 3))
    assert all(len({found.tobytes() for found in parts}) == 1 for parts in zip(one, two, three, strict=True))
    scores, positive = one
    assert np.isneginf(scores[OTHERS < 0]).all() and (OTHERS < 0).any()
    there = OTHERS >= 0
    np.testing.assert_allclose(scores[there], np.take_along_axis(world.exact, np.maximum(OTHERS, 0), 1)[there], atol=1e-6)
    query_n = np.repeat(np.arange(NUM_QUERIES), np.diff(JUDGED.positive_indptr))
    np.testing.assert_allclose(positive, world.exact[query_n, JUDGED.positive_rows], atol=1e-6)
    # The positives are known; asked for as if they were not, they have the same bits.
    table = Listed(JUDGED.positive_indptr, JUDGED.positive_rows).table(slice(0, NUM_QUERIES))
    before = on_ranks(world, 2, lambda dense, tile, places: (dense.score(places, table[places]),))[0]
    assert before[table >= 0].tobytes() == positive.tobytes()


def test_positives_are_asked_of_nobody(world, monkeypatch):
    asked = []

    def ask(dense, tile, places):
        monkeypatch.setattr(type(dense.asker), "ask_scores", lambda self, *pairs: asked.append(len(pairs[0])) or np.zeros(0))
        dense.find(tile)
        return (dense.score_positives(places),)

    assert np.isfinite(on_ranks(world, 1, ask)[0]).all() and asked == [0, 0, 0]
