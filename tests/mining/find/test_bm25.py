"""BM25: the words of code, the formula on a small corpus, ties, and texts without a common word."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from mining.find.bm25 import bm25_top_k, split_words


def corpus(passages, queries):
    return SimpleNamespace(corpus=Dataset.from_dict({"text": passages}), queries=Dataset.from_dict({"text": queries}))


@pytest.mark.parametrize(
    "text, words",
    [
        ("parseHTTPHeader", ["parse", "http", "header"]),
        ("def read_csv_file(path2D):", ["def", "read", "csv", "file", "path2", "d"]),
        ("Größe__init__ ünïcode", ["größe", "init", "ünïcode"]),
        ("()", []),
    ],
)
def test_identifiers_are_split_into_words(text, words):
    assert split_words(text) == words


def test_scores_are_those_of_the_formula():
    passages = [["sort", "list"], ["sort", "sort", "file", "line"], ["open", "file"]]
    scores, ids = bm25_top_k(corpus([" ".join(p) for p in passages], ["sort"]), np.array([0]), 3)

    def plain(passage):
        tf, df, mean = passage.count("sort"), 2, sum(map(len, passages)) / 3
        return math.log(1 + (3 - df + 0.5) / (df + 0.5)) * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(passage) / mean))

    expected = sorted([(plain(passages[0]), 0), (plain(passages[1]), 1)], reverse=True)
    assert ids[0].tolist() == [i for _, i in expected] + [-1]
    np.testing.assert_allclose(scores[0, :2], [s for s, _ in expected], rtol=1e-5)
    assert scores[0, 2] == -np.inf


def test_equal_scores_come_in_the_order_of_rows():
    data = corpus(["other word", *["sort list"] * 50], ["sort", "nothing known"])
    _, ids = bm25_top_k(data, np.array([0, 1]), 5)
    assert ids.tolist() == [[1, 2, 3, 4, 5], [-1] * 5]


def test_forbidden_documents_and_a_small_corpus_leave_empty_places():
    data = corpus(["sort a", "sort b", "sort c"], ["sort"])
    _, ids = bm25_top_k(data, np.array([0]), 5, np.array([True, False, True]))
    assert ids.tolist() == [[0, 2, -1, -1, -1]]
