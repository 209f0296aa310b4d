"""What makes a version of the negatives doubtful begins with the version that has it, and ends with the next that has not."""

import numpy as np
import pytest

from mining.job import MineJob
from mining.settings import MineSettings, SampleSettings, SearchSettings
from mining.table.doubts import HARD, doubts, hardness, last_suspected, mining_defeats, random_score
from trainer.handoff.negatives import publish_negatives


def manifest(dropped=0, suspected=0.02, negative=0.4, positive=0.65, at_random=0.05, random_share=0.0, known=100):
    return {
        "counts": {"candidates": 1000 + known},
        "filter": {"dropped": {"judged": known, "range": 0, "relative_margin": dropped}},
        "audit": {"share_suspected_false": suspected, "scores": {"q50": negative}, "positive_scores": {"q50": positive}},
        "sample": {"random_share": random_share},
        "random_score": at_random,
    }


def kinds(found):
    return [kind for kind, sentence in found.items() if sentence is not None]


def test_a_version_like_the_quickstarts_is_not_doubted():
    assert kinds(doubts(manifest(dropped=30, negative=0.18, positive=0.52, at_random=0.03), 0.03)) == []


def test_candidates_dropped_for_their_scores_are_counted_without_those_that_are_known():
    assert kinds(doubts(manifest(dropped=510), None)) == ["most_dropped"]
    sentence = doubts(manifest(dropped=510), None)["most_dropped"]
    assert "51% of the candidates are dropped for their scores (relative_margin 510)" in sentence
    assert kinds(doubts(manifest(dropped=490, known=900), None)) == [], "judged ones and repeats are no loss"


@pytest.mark.parametrize(
    "now, before, is_jump", [(0.20, 0.05, True), (0.04, 0.01, False), (0.20, 0.15, False), (0.5, None, False)]
)
def test_a_jump_is_a_share_that_more_than_doubles(now, before, is_jump):
    assert (kinds(doubts(manifest(suspected=now), before)) == ["false_negatives_jump"]) == is_jump


def test_negatives_that_are_near_random_passages_are_not_hard_whatever_the_scale():
    for scale, shift in ((1.0, 0.0), (0.1, 0.85), (1.0, -0.3)):  # an encoder that puts all texts near to each other, and so on
        easy, good = ({"negative": n * scale + shift} for n in (0.16, 0.30))
        rest = {"positive": 0.65 * scale + shift, "at_random": 0.04 * scale + shift}
        assert kinds(doubts(manifest(**easy, **rest), None)) == ["hardly_hard"]
        assert kinds(doubts(manifest(**good, **rest), None)) == []
    assert kinds(doubts(manifest(negative=0.1, random_share=0.6), None)) == [], "random ones were asked for"
    unknown = manifest() | {"random_score": None}
    assert kinds(doubts(unknown, None)) == [], "BM25's scores are compared with none"
    assert hardness(0.2, 0.1, 0.1) is None and hardness(0.1, 0.5, 0.1) == 0 < HARD


def test_the_score_of_random_pairs_is_their_median():
    draw = np.random.default_rng(0)
    queries, passages = draw.normal(size=(30, 8)), draw.normal(1, 1, size=(50, 8))
    every = [float(q @ p) for q in queries for p in passages]
    assert random_score(queries, passages) == pytest.approx(np.median(every), abs=1e-5)
    assert random_score(queries[:0], passages) is None


def test_the_last_share_is_that_of_the_newest_version(tmp_path):
    assert last_suspected(tmp_path) is None
    for version, share in enumerate([None, 0.125]):
        audit = {"audit": {"share_suspected_false": share}}
        publish_negatives(tmp_path, version, np.arange(3), np.arange(2), np.zeros(2, np.float32), audit)
        assert last_suspected(tmp_path) == share


def test_numbers_that_take_most_of_the_corpus_are_said():
    job = MineJob(search=SearchSettings(top_k=200), mine=MineSettings(bm25_top_k=50), sample=SampleSettings(num_negatives=16))
    assert kinds(mining_defeats(job, 400)) == []
    assert kinds(mining_defeats(job, 240)) == ["top_k"]
    assert "search.top_k=200 is most of the corpus of 240 passages" in mining_defeats(job, 240)["top_k"]
    assert kinds(mining_defeats(job, 30)) == ["top_k", "bm25_top_k", "num_negatives"]
