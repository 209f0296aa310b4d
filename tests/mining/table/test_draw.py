"""From candidates to a table, with a matrix of scores for an encoder: against plain Python, one query after the other."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mining.find.retrieve import with_others
from mining.ranks import Ranks
from mining.settings import FilterSettings, RerankSettings, SampleSettings
from mining.table.filters import Keys
from mining.table.judgements import Judgements
from mining.table.kept import KeptTiles
from mining.table.share import Draw
from tests.mining.table import device
from tests.mining.table.whole import draw_negatives, whole
from trainer.encoder.topk import top_k
from trainer.handoff.negatives import Negatives

NUM_QUERIES, NUM_PASSAGES, TOP_K = 60, 40, 12
RANKS = Ranks(MPI.COMM_SELF, lambda: False)


@dataclass
class Matrix:
    """A retriever that reads all scores from a matrix."""

    score_QN: np.ndarray
    judgements: Judgements

    def find(self, tile):
        return top_k(self.score_QN[tile], np.eye(NUM_PASSAGES, dtype=np.float32), TOP_K, allowed_N=self.judgements.allowed_N)

    def score(self, places, ids_nR):
        scores = np.take_along_axis(self.score_QN[places], np.maximum(ids_nR, 0), 1)
        return np.where(ids_nR < 0, -np.inf, scores).astype(np.float32)

    def score_positives(self, places):
        indptr, rows = self.judgements.positives(places)
        return self.score_QN[places][np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)), rows]


@dataclass
class Words:
    """A cross-encoder that reads its scores from a matrix, too."""

    score_QN: np.ndarray

    def score(self, query_places, passage_rows, on_block):
        on_block(0.5)
        assert (np.diff(query_places) >= 0).all()
        return self.score_QN[query_places, passage_rows].copy()


def matrix(seed):
    return np.random.default_rng(seed).normal(size=(NUM_QUERIES, NUM_PASSAGES)).astype(np.float32)


def judgements():
    """Query q has the positives q % 7 and q % 7 + 20; passage 39 is held out."""
    rows = np.stack([np.arange(NUM_QUERIES) % 7, np.arange(NUM_QUERIES) % 7 + 20], 1).ravel()
    indptr = np.arange(NUM_QUERIES + 1) * 2
    allowed = np.arange(NUM_PASSAGES) != 39
    return Judgements(np.arange(NUM_QUERIES) * 3, indptr, rows, np.ones(len(rows)), np.arange(NUM_QUERIES), indptr, rows, allowed)


JUDGED = judgements()
SCORES = matrix(0)
POSITIVE = np.stack([[q % 7, q % 7 + 20] for q in range(NUM_QUERIES)])
LOWEST = np.take_along_axis(SCORES, POSITIVE, 1).min(1)
KEYS = (Keys(np.arange(NUM_QUERIES) + 1000, np.arange(NUM_PASSAGES)),)


TOLD: list[tuple[int, int]] = []


def draw(filter=(), sample=(), rerank=(), version=1, scores=SCORES, **how):
    settings = (
        FilterSettings(**{"relative_margin": "off", **dict(filter)}),
        SampleSettings(**{"num_negatives": 4, **dict(sample)}),
        RerankSettings(**dict(rerank)),
    )
    with tempfile.TemporaryDirectory() as run:
        drawn = draw_negatives(
            Draw(*settings, 0, version, JUDGED, KEYS, device=device.DEVICE, **how),
            RANKS,
            Matrix(scores, JUDGED),
            KeptTiles(Path(run), {}),
            lambda *told: TOLD.append(told),
        )
        found = whole(drawn)
    rows = np.repeat(np.arange(NUM_QUERIES), np.diff(found.indptr))
    np.testing.assert_array_equal(found.scores, scores[rows, found.ids])
    order = np.lexsort((found.ids, -found.scores, rows))
    np.testing.assert_array_equal(order, np.arange(len(rows)))
    assert not (found.ids == 39).any() and not (found.ids[:, None] == POSITIVE[rows]).any()
    return found, np.split(found.ids, found.indptr[1:-1])


def candidates(query, scores=SCORES):
    allowed = [n for n in np.argsort(-scores[query]) if n != 39][:TOP_K]
    return [n for n in allowed if n not in POSITIVE[query]]


def without(margin=0.0):
    """Queries of whose candidates none scores below the positive."""
    return [q for q in range(NUM_QUERIES) if not [n for n in candidates(q) if SCORES[q, n] < LOWEST[q] - margin * abs(LOWEST[q])]]


def test_the_best_that_pass_the_margin_are_taken():
    found, rows = draw({"relative_margin": 0.3, "when_empty": "none"}, {"method": "top"})
    for query, ids in enumerate(rows):
        passed = [n for n in candidates(query) if SCORES[query, n] < LOWEST[query] - 0.3 * abs(LOWEST[query])]
        assert ids.tolist() == passed[:4]
    assert found.counts["queries_without"] == len(without(0.3)) > 10 and "random" not in found.counts
    np.testing.assert_array_equal(found.more["positive_scores"], np.take_along_axis(SCORES, POSITIVE, 1).ravel())


def test_a_query_without_any_candidate_gets_random_passages():
    found, rows = draw({"relative_margin": 0.3}, {"method": "top"})
    empty = without(0.3)
    assert found.counts["queries_without"] == len(empty) and found.counts["random"] + found.counts["unfilled"] == 4 * len(empty)
    num_left = 0
    for query in empty:
        ceiling = LOWEST[query] - 0.3 * abs(LOWEST[query])
        left = [n for n in range(39) if SCORES[query, n] < ceiling and n not in POSITIVE[query]]
        assert len(set(rows[query])) == len(rows[query]) and set(rows[query]) <= set(left)
        num_left += min(4, len(left))
    # 160 draws miss one passage of 39 once in 60 times.
    assert 0.97 * num_left < found.counts["random"] <= num_left and found.counts["redrawn"] > found.counts["random"]
    chosen = np.concatenate([rows[query] for query in empty])
    assert len(set(chosen)) > 25, "from all over the corpus"


def test_or_its_candidates_of_the_lowest_scores_that_the_rules_on_scores_admit():
    # The first three places are too near for some, and the others too far for the band.
    found, rows = draw({"relative_margin": 0.1, "positive": "best", "range_max": 3, "when_empty": "lowest"})
    num_far = 0
    for query, ids in enumerate(rows):
        best = SCORES[query, POSITIVE[query]].max()
        passed = [n for n in candidates(query) if SCORES[query, n] < best - 0.1 * abs(best)]
        if not set(passed) & set(candidates(query)[:3]):
            assert ids.tolist() == passed[-4:]
            num_far += bool(passed)
    assert "random" not in found.counts and num_far > 5
    assert 0 < sum(len(ids) == 0 for ids in rows) == found.counts["queries_without"] - num_far


def test_a_share_of_random_passages_is_mixed_in():
    found, rows = draw(sample={"method": "top", "random_share": 0.5})
    assert found.counts["random"] == 2 * NUM_QUERIES
    for query, ids in enumerate(rows):
        assert set(candidates(query)[:2]) <= set(ids) and len(set(ids)) == 4
    extra = np.concatenate([[n for n in ids if n not in candidates(q)[:2]] for q, ids in enumerate(rows)])
    assert len(set(extra)) > 30
    again, _ = draw(sample={"method": "top", "random_share": 0.5}, version=2)
    assert (again.ids != found.ids).any(), "drawn anew for each version"


def last_version(found, **more):
    return Negatives(found.indptr, found.ids, found.scores, 1, {}, **more)


def test_negatives_stay_until_they_are_easy():
    sample = {"method": "top", "replace": "easy"}
    first, first_rows = draw(sample=sample)
    now = SCORES * np.where(np.random.default_rng(1).random(SCORES.shape) < 0.5, 0.5, 1).astype(np.float32)
    second, second_rows = draw(sample=sample, scores=now, version=2, last=last_version(first))
    at_first = {(q, n): SCORES[q, n] for q, ids in enumerate(first_rows) for n in ids}
    for query, ids in enumerate(second_rows):
        stay = [n for n in first_rows[query] if not (1.15 * now[query, n] < SCORES[query, n] and abs(now[query, n]) < 0.8)]
        new = [n for n in [*candidates(query, now)] if n not in stay]
        assert set(ids) == set(stay) | set(new[: 4 - len(stay)])
    kept = sum(len(set(a) & set(b)) for a, b in zip(first_rows, second_rows, strict=True))
    assert 0.3 * len(first.ids) < second.counts["stayed"] <= kept < len(first.ids)
    # What stays is compared with its first score ever after, not with its last.
    third, _ = draw(sample=sample, scores=now, version=3, last=last_version(second, first_scores=second.more["first_scores"]))
    np.testing.assert_array_equal(third.ids, second.ids)
    rows = np.repeat(np.arange(NUM_QUERIES), np.diff(second.indptr))
    expected = [
        at_first[q, n] if (q, n) in at_first and not (1.15 * now[q, n] < at_first[q, n] and abs(now[q, n]) < 0.8) else now[q, n]
        for q, n in zip(rows, second.ids, strict=True)
    ]
    np.testing.assert_array_equal(second.more["first_scores"], np.array(expected, np.float32))


def test_random_negatives_do_not_stay():
    sample = {"method": "top", "replace": "easy", "random_share": 0.5}
    first, _ = draw(sample=sample)
    assert np.isinf(first.more["first_scores"]).sum() == first.counts["random"]
    second, _ = draw(sample=sample, version=2, last=last_version(first, first_scores=first.more["first_scores"]))
    is_random = np.isinf(first.more["first_scores"])
    assert second.counts["stayed"] == 2 * NUM_QUERIES
    np.testing.assert_array_equal(second.ids[~np.isinf(second.more["first_scores"])], first.ids[~is_random])


def test_a_cross_encoder_filters_and_its_scores_stand_beside_every_negative():
    teacher = matrix(5)
    rerank = {"model": "some", "top_k": 6, "margin": 0.5, "max_score": 1.0}
    how = dict(filter={"when_empty": "random"}, sample={"method": "top", "random_share": 0.25}, reranker=Words(teacher))
    found, rows = draw(rerank=rerank, **how)
    for query, ids in enumerate(rows):
        most = min(teacher[query, POSITIVE[query]].min() - 0.5, 1.0)
        passed = [n for n in candidates(query)[:6] if teacher[query, n] < most]
        assert set(passed[:3]) <= set(ids) and len(ids) <= (len(passed[:3]) + 1 if passed else 4)
        assert (teacher[query, ids] < most).all()
    assert found.counts["unfilled"] < found.counts["random"] < found.counts["redrawn"]
    flat = np.repeat(np.arange(NUM_QUERIES), np.diff(found.indptr))
    np.testing.assert_array_equal(found.more["teacher_scores"], teacher[flat, found.ids])
    np.testing.assert_array_equal(found.more["positive_teacher_scores"], np.take_along_axis(teacher, POSITIVE, 1).ravel())
    assert (30, 60) in TOLD, "half of the pairs"
    assert all(found.dropped[f"rerank_{name}"] > 0 for name in ("top_k", "margin", "max_score"))


def test_candidates_of_two_retrievers_are_one_table_without_repeats():
    retriever = Matrix(SCORES, JUDGED)
    scores, ids = retriever.find(slice(0, NUM_QUERIES))
    others = np.random.default_rng(2).integers(-1, NUM_PASSAGES, (NUM_QUERIES, 1)) * np.ones((1, 3), int)
    others[:, 1:] = np.random.default_rng(3).permuted(np.tile(np.arange(NUM_PASSAGES), (NUM_QUERIES, 1)), axis=1)[:, :2]
    others[:, 1:] = np.where(others[:, 1:] == others[:, :1], -1, others[:, 1:])
    both_scores, both = with_others(retriever, slice(0, NUM_QUERIES), scores, ids, others)
    for query, row in enumerate(both):
        expected = sorted({*ids[query], *others[query]} - {-1}, key=lambda n: (-SCORES[query, n], n))
        assert row[row >= 0].tolist() == expected and (row[len(expected) :] == -1).all()
        np.testing.assert_array_equal(both_scores[query, : len(expected)], SCORES[query, expected])


def test_a_corpus_with_nothing_to_offer_leaves_rows_empty(tmp_path):
    nothing = replace(JUDGED, allowed_N=np.zeros(NUM_PASSAGES, bool))
    settings = FilterSettings(), SampleSettings(), RerankSettings()
    tiles = KeptTiles(tmp_path, {})
    how = Draw(*settings, 0, 1, nothing, KEYS, device=device.DEVICE)
    found = draw_negatives(how, RANKS, Matrix(SCORES, nothing), tiles, lambda *_: None)
    assert found.sizes["ids"] == 0 and found.num_empty == NUM_QUERIES == found.counts["queries_without"]


@pytest.mark.parametrize("when_empty", ["random", "lowest", "none"])
def test_every_fallback_is_counted(when_empty):
    found, rows = draw({"relative_margin": 0.3, "when_empty": when_empty})
    assert found.counts["queries_without"] == len(without(0.3))
    num_empty = sum(len(ids) == 0 for ids in rows)
    if when_empty == "random":  # all that the corpus has left for them
        assert found.counts["random"] + found.counts["unfilled"] == 4 * len(without(0.3)) and num_empty < 10
    else:
        assert num_empty == len(without(0.3)), "the margin is all that any of them could break"
