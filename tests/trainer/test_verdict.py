"""Intervals are those of scipy's bootstrap and of normal theory; a verdict says no more than so many queries can tell."""

import numpy as np
import pytest
import scipy.stats

import trainer.verdict
from trainer.verdict import FEWEST, all_intervals, compare, intervals, paired_interval, verdict

MEASURES = ["ndcg@10", "mrr@10"]


def measured(num_queries, shift=0.0, seed=0):
    """Reciprocal ranks as they come: many 0 and 1, some between."""
    draw = np.random.default_rng(seed)
    return np.clip(1 / draw.integers(1, 8, num_queries) * draw.choice([0, 1], num_queries, p=[0.2, 0.8]) + shift, 0, 1)


def test_an_interval_is_that_of_scipys_bootstrap_and_of_normal_theory():
    value_Q = measured(300)
    low, high = intervals(value_Q[:, None])[0]
    there = scipy.stats.bootstrap((value_Q,), np.mean, method="percentile", n_resamples=2000, rng=np.random.default_rng(1))
    normal = scipy.stats.norm.interval(0.95, value_Q.mean(), value_Q.std() / np.sqrt(len(value_Q)))
    width = high - low
    # With 2,000 resamples an end has a standard error of some 3 percent of the width.
    assert (low, high) == pytest.approx(there.confidence_interval, abs=0.12 * width)
    assert (low, high) == pytest.approx(normal, abs=0.12 * width)


def test_a_difference_is_that_of_pairs_and_narrower_than_of_strangers():
    before = measured(300)
    after = np.clip(before + np.random.default_rng(1).normal(0.02, 0.05, 300), 0, 1)
    low, high = paired_interval(after, before)
    there = scipy.stats.bootstrap(
        (after, before), lambda a, b, axis: (a - b).mean(axis), paired=True, method="percentile", n_resamples=2000
    )
    assert (low, high) == pytest.approx(there.confidence_interval, abs=0.15 * (high - low))
    strangers_low, strangers_high = paired_interval(after, np.random.default_rng(2).permutation(before))
    assert high - low < 0.3 * (strangers_high - strangers_low)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    covered = []
    for seed in range(200):
        low, high = intervals(np.random.default_rng(seed).beta(0.5, 0.5, (60, 1)), seed)[0]
        covered.append(low <= 0.5 <= high)
    assert 0.90 <= np.mean(covered) <= 0.985  # of 200, three standard errors about 95 percent


def test_what_is_held_at_once_changes_nothing(monkeypatch):
    columns = np.stack([measured(50), measured(50, seed=1)], axis=1)
    whole = intervals(columns)
    monkeypatch.setattr(trainer.verdict, "HELD", 7 * 50)
    assert intervals(columns) == pytest.approx(whole, abs=1e-12), "but the last bits of a product"
    assert intervals(columns[:, :1])[0] == pytest.approx(whole[0], abs=1e-12), "each column as if it were alone"


def test_few_unknown_or_other_queries_are_unclear():
    better = measured(FEWEST, shift=0.3)
    assert compare(better, measured(FEWEST)) == "better" and compare(measured(FEWEST), better) == "worse"
    assert compare(better[1:], measured(FEWEST)[1:]) == "unclear", "too few"
    assert compare(better, None) == compare(better, measured(FEWEST + 1)) == "unclear"
    assert compare(better, better) == "unclear"


def judged(num_queries=100, **rows):
    each = {name: np.stack([row, row], axis=1) for name, row in rows.items()}
    found = all_intervals(each, MEASURES)
    means = {name: dict(zip(MEASURES, each_QM.mean(0), strict=True)) for name, each_QM in each.items()}
    return found, verdict(means, found, "mrr@10", "MRR@10", num_queries)


@pytest.mark.parametrize("shift, level, head", [(0.1, "better", "Better than the untrained model"), (0, "unclear", "No clear")])
def test_a_verdict_says_which_is_better_and_how_sure_that_is(shift, level, head):
    before, after = measured(100), measured(100, shift)
    found, said = judged(untrained=before, trained=after)
    assert said["level"] == level and said["sentence"].startswith(head) and said["warnings"] == []
    low, high = found["trained - untrained"]["mrr@10"]
    figures = f"MRR@10 {before.mean():.3f} -> {after.mean():.3f} ({after.mean() - before.mean():+.3f}, "
    assert f"{figures}95 % interval {low:+.3f} to {high:+.3f}, 100 queries)" in said["sentence"]
    assert found["trained"]["mrr@10"][0] < after.mean() < found["trained"]["mrr@10"][1]


def test_worse_than_untrained_and_worse_than_bm25_are_said_and_warned_of():
    _, said = judged(bm25=measured(100, 0.2), untrained=measured(100, 0.1), trained=measured(100))
    assert said["level"] == "worse" and said["sentence"].startswith("Worse than the untrained model: MRR@10")
    assert [warning["kind"] for warning in said["warnings"]] == ["below_untrained", "below_bm25"]
    assert " Worse than BM25: MRR@10" in said["sentence"]
    _, said = judged(bm25=measured(100, 0.2), untrained=measured(100), trained=measured(100, 0.1))
    assert said["level"] == "better" and [warning["kind"] for warning in said["warnings"]] == ["below_bm25"]


def test_what_cannot_be_told_is_not_claimed():
    assert judged(5, untrained=measured(5), trained=measured(5, 0.5))[1]["level"] == "unclear"
    rows = {"untrained": dict.fromkeys(MEASURES, 0.1), "trained": dict.fromkeys(MEASURES, 0.2)}
    said = verdict(rows, {}, "mrr@10", "MRR@10", 0)  # an older run kept nothing of each query
    assert said["level"] == "unclear" and "interval" not in said["sentence"]
    assert verdict({}, {}, "mrr@10", "MRR@10", 0)["level"] == "unclear" and all_intervals({}, MEASURES) == {}
