"""Scores of pairs that are known before the stream, and of pairs that are asked for after it: the same bits on any ranks."""

import numpy as np
import pytest
import torch

import mining.find.known_pairs
from mining.find.known_pairs import KnownPairs, Listed, bytes_of_pair, known_before, list_together
from mining.find.search import share_of
from mining.ranks import GivenUp
from mining.settings import SampleSettings
from mining.table.sampling import random_numbers
from tests.mining.find.world import NUM_PASSAGES, NUM_QUERIES, SHARD_ROWS, judgements
from tests.mining.threads import on_threads
from trainer.encoder.pair_scores import score_pairs
from trainer.handoff.negatives import Negatives

JUDGED = judgements()
RNG = np.random.default_rng(3)


def some_pairs() -> Listed:
    """Passages of every query, none of every third, some of them twice."""
    rows = [RNG.integers(NUM_PASSAGES, size=0 if q % 3 == 0 else q % 9) for q in range(NUM_QUERIES)]
    return Listed(np.cumsum([0, *map(len, rows)]), np.concatenate(rows).astype(np.int32))


SOME = some_pairs()
SOURCES = [JUDGED.positives, SOME]


def expected_pairs(places: slice) -> list[tuple[int, int]]:
    pairs = set()
    for query in range(places.start, places.stop):
        for source in SOURCES:
            pairs |= {(query, int(row)) for row in source(slice(query, query + 1))[1]}
    return sorted(pairs)


def of_tiles(ranks, places: slice, query_tile: int, brought):
    """Return (query, passage row, score) of all pairs of this rank's shares of the tiles, in their order."""
    columns = []
    for start in range(places.start, places.stop, query_tile):
        scored = brought(slice(start, min(start + query_tile, places.stop)))
        columns.append((scored.first + (scored.keys >> 32), scored.keys & (1 << 32) - 1, scored.scores))
    return [np.concatenate(column) for column in zip(*columns, strict=True)]


def by_pair(parts) -> dict[tuple[int, int], float]:
    return {(int(q), int(n)): float(s) for part in parts for q, n, s in zip(*part, strict=True)}


@pytest.mark.parametrize("places", [slice(0, NUM_QUERIES), slice(37, 120)], ids=["all", "a pass of some"])
def test_every_known_pair_comes_to_its_query_with_the_same_bits_on_any_ranks(world, places):
    found = []
    for num_ranks, seed in ((1, 0), (2, 0), (3, 0), (3, 1)):
        owners = world.owners(num_ranks, seed)

        def go(ranks, owners=owners):
            known = world.known(ranks, owners, SOURCES, places)
            return of_tiles(ranks, places, 70, lambda tile: known.bring(ranks, tile))

        parts = on_threads(num_ranks, go)
        assert num_ranks == 1 or all(len(part[0]) for part in parts)
        found.append(by_pair(parts))
    assert found[0] == found[1] == found[2] == found[3] and sorted(found[0]) == expected_pairs(places)
    query_n, row_n = np.array(list(found[0])).T
    assert not JUDGED.allowed_N[row_n].all(), "positives that are held out are scored, too"
    np.testing.assert_allclose(list(found[0].values()), world.exact[query_n, row_n], atol=1e-6)  # sums of 24 in float32


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_what_is_asked_for_has_the_bits_of_what_is_known(world, num_ranks):
    owners = world.owners(num_ranks)

    def go(ranks):
        known, asker = world.known(ranks, owners, SOURCES), world.asker(ranks, owners)
        query_n, row_n, scores = of_tiles(ranks, slice(0, NUM_QUERIES), NUM_QUERIES, lambda tile: known.bring(ranks, tile))
        order = np.random.default_rng(ranks.rank).permutation(len(row_n))[: 40 * (2 - ranks.rank)]  # rank 2 asks for nothing
        return scores[order], asker.ask_scores(query_n[order], row_n[order])

    for rank, (scores, asked) in enumerate(on_threads(num_ranks, go)):
        assert scores.tobytes() == asked.tobytes() and asked.dtype == np.float32 and (len(asked) > 0) == (rank < 2)


def test_a_pair_has_the_score_that_it_has_alone(world):
    known, tables = {}, [torch.from_numpy(t.read(np.arange(t.shards.num_rows))) for t in (world.queries, world.passages)]

    def go(ranks):
        pairs = world.known(ranks, world.owners(1), SOURCES)
        known.update(by_pair([of_tiles(ranks, slice(0, NUM_QUERIES), 64, lambda tile: pairs.bring(ranks, tile))]))

    on_threads(1, go)
    for query, row in expected_pairs(slice(0, NUM_QUERIES))[::7]:
        assert score_pairs(*tables, torch.tensor([query]), torch.tensor([row])).item() == known[query, row]


def test_a_shard_that_nobody_saw_or_two_ranks_saw_is_noticed(world):
    def go(ranks, owners):
        world.known(ranks, owners if ranks.rank == 0 else np.ones_like(owners), SOURCES).bring(ranks, slice(0, NUM_QUERIES))

    of_both = np.zeros(world.passages.shards.num_shards)  # rank 1 sees all shards, too
    nobody = of_both + np.arange(len(of_both)) % 2 * 5
    for num_ranks, owners in ((2, of_both), (1, nobody)):
        with pytest.raises(AssertionError, match="not scored by exactly one rank"):
            on_threads(num_ranks, lambda ranks, owners=owners: go(ranks, owners))


def test_queries_without_pairs_and_ranks_without_queries_ask_for_nothing(world):
    nothing = Listed(np.zeros(NUM_QUERIES + 1, np.int64), np.zeros(0, np.int64))

    def go(ranks):
        owners = world.owners(2)
        scored = world.known(ranks, owners, [nothing]).bring(ranks, slice(9, 10))  # rank 0 has no query
        unknown = scored.of(np.array([9]), np.array([4]))
        return len(scored.keys), np.isnan(unknown).all(), len(world.asker(ranks, owners).ask_scores(*np.zeros((2, 0), int)))

    assert on_threads(2, go) == [(0, True, 0)] * 2


def test_a_shard_that_is_lost_is_given_up_by_all_ranks(world):
    file = next(world.passages.shards.folder.glob("shard-000003*/embeddings.npy"))
    aside, owners, met = file.rename(file.with_suffix(".aside")), np.arange(8) % 3, []

    def go(ranks):
        try:
            world.asker(ranks, owners).ask_scores(np.array([4]), np.array([100]))  # of shard 3
        except GivenUp as given_up:
            met.append(str(given_up))

    on_threads(3, go)
    aside.rename(file)
    assert len(met) == 3 and "shard-000003" in met[0]


def test_what_a_draw_will_ask_for_is_listed_before():
    sample, last = (
        SampleSettings(num_negatives=8, random_share=0.5, replace="easy"),
        Negatives(SOME.indptr, SOME.rows, None, 1, {}),
    )
    words = Listed(np.arange(NUM_QUERIES + 1), np.arange(NUM_QUERIES) + 50)
    places = slice(20, 90)
    known = KnownPairs(places, torch.zeros(70, 1), known_before(JUDGED, sample, 7, 2, last, words), SHARD_ROWS, NUM_PASSAGES)
    allowed, listed = np.flatnonzero(JUDGED.allowed_N), set()
    for query in range(20, 90):
        random = allowed[random_numbers(7, 2, JUDGED.query_rows[[query]], range(6), len(allowed))[0]]
        one = slice(query, query + 1)
        listed |= {(query, int(n)) for n in [*JUDGED.positives(one)[1], *SOME(one)[1], *random, query + 50]}
    rows = np.repeat(np.arange(20, 90), np.diff(known._indptr))
    assert list(zip(rows.tolist(), known._row_n.tolist(), strict=True)) == sorted(listed)
    plain = known_before(JUDGED, SampleSettings(), 7, 2, last, None)
    assert plain == [JUDGED.positives]


def test_nothing_is_listed_where_no_passage_may_be_drawn():
    nobody = judgements()
    nobody.allowed_N[:] = False
    sources = known_before(nobody, SampleSettings(random_share=1.0), 7, 2, None, None)
    known = KnownPairs(slice(0, 3), torch.zeros(3, 1), sources, SHARD_ROWS, NUM_PASSAGES)
    assert known._row_n.tolist() == [0, 1, 21, 2]  # the positives


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_candidates_of_shares_are_listed_on_every_rank(num_ranks):
    found_QK = np.random.default_rng(4).integers(-1, 60, (NUM_QUERIES, 5))
    found_QK[::4] = -1

    def go(ranks):
        def find(tile):
            share = share_of(tile.stop - tile.start, ranks.rank, ranks.num_ranks)
            return found_QK[tile.start + share.start : tile.start + share.stop]

        return list_together(ranks, find, NUM_QUERIES, 64)

    for listed in on_threads(num_ranks, go):
        assert listed.rows.itemsize == 4 and len(listed.indptr) == NUM_QUERIES + 1
        for query, ids in enumerate(found_QK):
            assert listed(slice(query, query + 1))[1].tolist() == ids[ids >= 0].tolist()
        table = listed.table(slice(0, 9))
        assert (table >= -1).all() and [row[row >= 0].tolist() for row in table] == [r[r >= 0].tolist() for r in found_QK[:9]]


@pytest.mark.parametrize("num_shards", [8, 70_000])
def test_pairs_are_put_in_order_block_by_block(num_shards, monkeypatch):
    monkeypatch.setattr(mining.find.known_pairs, "BLOCK_PAIRS", 13)
    row_n = np.random.default_rng(5).integers(num_shards * 4, size=100).astype(np.uint32)
    order_n, starts = mining.find.known_pairs._by_shard(row_n, 4, num_shards)
    np.testing.assert_array_equal(order_n, np.argsort(row_n // 4, kind="stable"))
    np.testing.assert_array_equal(starts, np.searchsorted(np.sort(row_n // 4), np.arange(num_shards + 1)))


def test_a_pair_takes_the_bytes_that_are_planned():
    known = KnownPairs(slice(0, NUM_QUERIES), torch.zeros(NUM_QUERIES, 1), SOURCES, SHARD_ROWS, NUM_PASSAGES)
    held = sum(array.nbytes for array in (known._row_n, known._order_n, known._score_n))
    assert held == bytes_of_pair(len(known._row_n)) * len(known._row_n)
    assert (bytes_of_pair(10**9), bytes_of_pair(10**10)) == (12, 16)
