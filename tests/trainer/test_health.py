"""Health figures against closed forms, and plain loops where there is none."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn.functional import normalize

from trainer import health
from trainer.health import alignment, distribution, effective_rank, evaluation_health, hardest_negatives, hubness, uniformity


def sphere(num_rows, width, seed=0):
    return normalize(torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_alignment_is_two_minus_twice_the_mean_cosine():
    a, b = sphere(50, 8), sphere(50, 8, seed=1)
    assert alignment(a, b) == pytest.approx(2 - 2 * float((a * b).sum(1).mean()), rel=1e-5)
    assert alignment(a, a) == 0 and alignment(a, -a) == pytest.approx(4)


def test_uniformity_is_the_papers_formula():
    rows = sphere(20, 4)
    potentials = [math.exp(-2 * float((a - b).square().sum())) for i, a in enumerate(rows) for b in rows[:i]]
    assert uniformity(rows) == pytest.approx(math.log(sum(potentials) / len(potentials)), rel=1e-5)


def test_uniformity_is_zero_when_collapsed_and_minus_eight_for_opposite_vectors():
    assert uniformity(torch.ones(5, 4) / 2) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-8)
    with pytest.raises(ValueError, match="there are 1 rows"):
        uniformity(torch.ones(1, 4))


def test_the_effective_rank_of_orthogonal_vectors_is_their_number():
    assert effective_rank(torch.eye(7, 16)) == pytest.approx(7, rel=1e-4)
    assert effective_rank(torch.ones(9, 16)) == pytest.approx(1, rel=1e-4)
    # Singular values 3 and 1: shares 3/4 and 1/4.
    wanted = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(wanted, rel=1e-4)


def test_hubness_is_the_skewness_of_occurrences():
    ids = np.random.default_rng(0).zipf(1.6, size=(40, 5)) % 30
    ids[3, 4] = -1
    found = [int((ids == passage).sum()) for passage in range(30)]
    assert hubness(ids, 30) == pytest.approx(scipy.stats.skew(found)) and hubness(ids, 30) > 1
    assert hubness(np.arange(6).reshape(3, 2), 6) == 0
    # One of N passages found by everybody: (N - 2) / sqrt(N - 1).
    assert hubness(np.zeros((5, 1), np.int64), 10) == pytest.approx(8 / 3)


def test_a_distribution_counts_every_score_and_orders_its_quantiles():
    scores = np.linspace(-1, 1, 201)
    found = distribution(scores)
    assert [found[f"p{q:02d}"] for q in (5, 25, 50, 75, 95)] == pytest.approx([-0.9, -0.5, 0, 0.5, 0.9])
    assert sum(found["counts"]) == 201 and len(found["counts"]) == health.NUM_BINS
    assert distribution(np.array([1.0000001]))["counts"][-1] == 1
    with pytest.raises(ValueError, match="no scores"):
        distribution(np.array([]))


def test_the_hardest_negative_is_the_best_passage_that_is_not_judged_positive():
    ids = np.array([[4, 2, 7], [0, 4, -1], [3, -1, -1]])
    scores = np.array([[0.9, 0.8, 0.1], [0.7, 0.6, -np.inf], [0.5, -np.inf, -np.inf]])
    pairs = np.array([0, 0, 1, 2]), np.array([4, 9, 4, 3])
    assert hardest_negatives(ids, scores, *pairs).tolist() == [0.8, 0.7], "the third query has no negative among its best"


def evaluation(queries, passages, k=12):
    """Return the arguments of evaluation_health for queries whose positive is the passage of the same number."""
    scores = queries @ passages.T
    best = scores.topk(k)
    rows = np.arange(len(queries))
    return {
        "query_QD": queries.numpy(),
        "passage_ND": passages.numpy(),
        "ids_Qk": best.indices.numpy(),
        "scores_Qk": best.values.numpy(),
        "query_rows_J": rows,
        "ids_J": rows,
        "sample_j": rows,
        "positive_jD": passages.numpy()[rows],
        "num_passages": len(passages),
    }


def test_an_evaluations_health_is_one_flat_dictionary():
    queries, passages = sphere(30, 8), sphere(100, 8, seed=1)
    found = evaluation_health(**evaluation(queries, passages))
    assert found["health/alignment"] == pytest.approx(alignment(queries, passages[:30]), rel=1e-5)
    assert found["health/uniformity/passages"] == pytest.approx(uniformity(passages), rel=1e-4)
    assert found["health/effective_rank/queries"] == pytest.approx(effective_rank(queries), rel=1e-4)
    assert found["health/positive_score/p50"] == pytest.approx(float((queries * passages[:30]).sum(1).quantile(0.5)), abs=1e-6)
    scores = (queries @ passages.T).index_put((torch.arange(30), torch.arange(30)), torch.tensor(-1.0))
    assert found["health/hardest_negative_score/p95"] == pytest.approx(float(scores.amax(1).quantile(0.95)), abs=1e-6)
    assert sum(found["health/hardest_negative_score/counts"]) == 30
    assert all(isinstance(value, float | list) and key.startswith("health/") for key, value in found.items())


def test_collapse_and_long_vectors_show():
    queries, passages = sphere(30, 8), sphere(100, 8, seed=1)
    centre = normalize(torch.ones(8), dim=0)
    narrow = [normalize(rows + 20 * centre, dim=1) for rows in (queries, passages)]
    healthy, collapsed = (evaluation_health(**evaluation(*pair)) for pair in ((queries, passages), narrow))
    assert collapsed["health/uniformity/passages"] > -0.1 > healthy["health/uniformity/passages"]
    assert collapsed["health/effective_rank/passages"] < 3 < healthy["health/effective_rank/passages"]
    longer = evaluation(queries, passages) | {"query_QD": 5 * queries.numpy(), "passage_ND": 3 * passages.numpy()}
    assert evaluation_health(**longer)["health/alignment"] == pytest.approx(healthy["health/alignment"], rel=1e-5)


def test_large_sides_are_sampled_the_same_way_each_time(monkeypatch):
    monkeypatch.setattr(health, "SAMPLE_ROWS", 16)
    arguments = evaluation(sphere(30, 8), sphere(100, 8, seed=1))
    found = [evaluation_health(**arguments, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0]["health/uniformity/passages"] != found[2]["health/uniformity/passages"]
    assert found[0]["health/effective_rank/passages"] <= 8


def test_one_query_with_nothing_but_its_positive_still_has_what_can_be_said():
    found = evaluation_health(**evaluation(sphere(1, 8), sphere(1, 8, seed=1), k=1))
    assert "health/alignment" in found and "health/positive_score/p50" in found
    assert not [name for name in found if "uniformity" in name or "hardest" in name]
