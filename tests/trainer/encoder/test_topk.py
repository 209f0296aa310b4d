"""Exact search against a plain sort, with ties, parts and too few passages."""

import itertools

import numpy as np
import pytest
import torch

from trainer.encoder import topk
from trainer.encoder.topk import BestOf, best_of_keys, merge_top_k, top_k


def plain(scores_QN, k):
    """Every row sorted by (score descending, number ascending), in plain Python."""
    ids = [sorted(range(len(row)), key=lambda j, row=row: (-row[j], j))[:k] for row in scores_QN]
    return np.array([[row[j] for j in best] for row, best in zip(scores_QN, ids, strict=True)]), np.array(ids)


def integers(shape, high, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.float32)


@pytest.mark.parametrize("high", [2, 100], ids=["many ties", "few ties"])
@pytest.mark.parametrize("columns", [8, 24, 4096])
def test_top_k_is_the_plain_sort(high, columns, monkeypatch):
    monkeypatch.setattr(topk, "tile_shape", lambda k, device_type: (3, columns))
    query, passage = integers((7, 4), high), integers((40, 4), high, 1)
    scores, ids = top_k(query, passage, 9, first_id=100)
    expected_scores, expected_ids = plain(query @ passage.T, 9)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(ids, expected_ids + 100)


@pytest.mark.parametrize("cuts", [[0, 40], [0, 13, 40], [0, 1, 2, 39, 40]])
def test_merged_parts_are_the_whole(cuts):
    query, passage = integers((5, 4), 3), integers((40, 4), 3, 1)
    parts = [top_k(query, passage[a:b], 6, first_id=a) for a, b in itertools.pairwise(cuts)]
    scores, ids = merge_top_k(parts, 6)
    np.testing.assert_array_equal(ids, plain(query @ passage.T, 6)[1])
    assert scores.dtype == np.float32


def test_forbidden_passages_are_never_returned():
    query, passage = integers((5, 4), 100), integers((8, 4), 100, 1)
    allowed = np.arange(8) % 2 == 0
    scores, ids = top_k(query, passage, 6, allowed_N=allowed)
    assert set(ids[:, :4].ravel()) == {0, 2, 4, 6}
    assert (ids[:, 4:] == -1).all() and np.isneginf(scores[:, 4:]).all()


def test_too_few_passages_fill_up_with_minus_one():
    scores, ids = top_k(integers((2, 4), 9), integers((3, 4), 9), 5)
    assert (ids[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()
    merged = merge_top_k([(scores, ids), (scores, np.where(ids >= 0, ids + 3, -1))], 5)
    assert (merged[1] >= 0).all()


@pytest.mark.parametrize("k", [1, 7, 300, 2500])
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_many_tiles_find_what_a_sort_of_all_scores_finds(k, stored, monkeypatch):
    monkeypatch.setattr(topk, "tile_shape", lambda k, device_type: (16, 512))
    draw = np.random.default_rng(k)
    query, passage = (draw.normal(size=(n, 8)).astype(np.float32).round(1) for n in (37, 2203))
    passage[::5] = passage[3]  # equal passages all over the place
    passage = passage.astype(stored)
    scores, ids = top_k(query, passage, k)
    expected = torch.from_numpy(query) @ torch.from_numpy(passage.astype(np.float32)).T
    order = np.lexsort((np.broadcast_to(np.arange(2203), expected.shape), -expected.numpy()), axis=1)[:, :k]
    np.testing.assert_array_equal(ids[:, : order.shape[1]], order)
    np.testing.assert_array_equal(scores[:, : order.shape[1]], np.take_along_axis(expected.numpy(), order, 1))
    assert (ids[:, 2203:] == -1).all()


def test_the_order_in_which_parts_are_looked_at_changes_nothing():
    query, passage = integers((5, 4), 3), integers((400, 4), 3, 1)
    whole = top_k(query, passage, 30)
    best = BestOf(query, 30)
    for start in (300, 100, 0, 200):
        best.look_at(passage, np.arange(start, start + 100))
    for found, expected in zip(best_of_keys([best.keys()], 30), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_large_id_and_a_negative_score_keep_their_order():
    scores = np.array([[-1.0, -2.0, 0.0, -0.0, 3.0]], np.float32)
    ids = np.array([[2**32 - 2, 0, 9, 8, -1]])
    found_scores, found_ids = merge_top_k([(scores, ids)], 4)
    assert found_ids.tolist() == [[8, 9, 2**32 - 2, 0]] and found_scores.tolist() == [[0.0, 0.0, -1.0, -2.0]]


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_find_the_same_to_the_bit_and_are_as_many_afterwards(threads, monkeypatch):
    monkeypatch.setattr(topk, "tile_shape", lambda k, device_type: (16, 64))
    rng = np.random.default_rng(0)
    query, passage = (rng.standard_normal((n, 24), np.float32) for n in (70, 500))
    alone = top_k(query, passage, 20)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = top_k(query, passage, 20)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
