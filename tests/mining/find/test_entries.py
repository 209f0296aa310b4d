"""An entry for each text against the plain way: sort all passages."""

import numpy as np
import pytest

from mining.find.entries import Entries, keys_of
from trainer.encoder.topk import best_of_keys


def plain_best(score_of_text, key_N, allowed_N, depth):
    """Return the passages by (score descending, row), of one query."""
    rows = np.flatnonzero(allowed_N)
    return rows[np.lexsort((rows, -score_of_text[key_N[rows]]))][:depth]


@pytest.mark.parametrize("num_texts, num_rows", [(1, 1), (1, 50), (12, 60), (40, 40), (90, 120)])
def test_entries_stand_for_all_passages_of_their_text(num_texts, num_rows):
    draw = np.random.default_rng(num_texts)
    key_N, allowed_N = draw.integers(num_texts, size=num_rows) * 977 - 5, draw.random(num_rows) < 0.9
    allowed_N[0] = True
    entries = Entries(allowed_N, key_N)
    rows = np.flatnonzero(entries.is_entry_N)
    _, first = np.unique(key_N[allowed_N], return_index=True)
    assert rows.tolist() == sorted(np.flatnonzero(allowed_N)[first].tolist()) and entries.num_entries == len(rows)
    texts, numbers = np.unique(key_N, return_inverse=True)
    for depth in (1, 7, num_rows + 3):
        for _ in range(4):
            score_of_text = draw.integers(4, size=len(texts)).astype(np.float32)  # many ties
            best = rows[np.argsort(-score_of_text[numbers[rows]], kind="stable")]
            scores, wanted = score_of_text[numbers[best]], plain_best(score_of_text, numbers, allowed_N, depth)
            found_scores, found = best_of_keys([entries.spread(scores[None], best[None], depth)], depth)
            assert found[0, : len(wanted)].tolist() == wanted.tolist() and (found[0, len(wanted) :] == -1).all()
            np.testing.assert_array_equal(found_scores[0, : len(wanted)], score_of_text[numbers[wanted]])
            for num in range(1, len(best)):  # of what was found alone, whenever that is said to be enough
                if entries.are_settled(scores[None, :num], best[None, :num], depth)[0]:
                    some = best_of_keys([entries.spread(scores[None, :num], best[None, :num], depth)], depth)[1]
                    assert some[0].tolist() == found[0].tolist()


def test_it_is_enough_when_nothing_is_left_or_all_cut_off_is_worse():
    entries = Entries(np.ones(9, bool))
    scores, ids = np.array([[3.0, 2, 1], [3, 1, 1], [3, 3, 3]], np.float32), np.array([[0, 1, 2], [3, 4, 5], [6, 7, -1]])
    assert entries.are_settled(scores, ids, 2).tolist() == [True, False, True]


def test_keys_are_those_of_exact_search():
    scores, ids = np.array([[0.5, -1.0, 2.0]], np.float32), np.array([[4, 7, -1]])
    found_scores, found_ids = best_of_keys([keys_of(scores, ids, 3)], 3)
    assert found_ids.tolist() == [[4, 7, -1]] and found_scores[0, :2].tolist() == [0.5, -1.0]
