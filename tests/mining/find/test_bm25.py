"""BM25: the words of code, and the scores, ranks and ties of a plain version, however the corpus is divided."""

import math
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import bm25s
import numpy as np
import pytest
from datasets import Dataset

from mining.find.bm25 import bm25_top_k, count_words, number_words, read_texts, split_words
from mining.find.postings import Postings, Search
from mining.find.words import part_of
from trainer.encoder.topk import merge_top_k


def corpus(passages, queries):
    return SimpleNamespace(corpus=Dataset.from_dict({"text": passages}), queries=Dataset.from_dict({"text": queries}))


def made_up(num_passages, num_queries, seed=0):
    """Return texts of words as frequent as those of a language, with empty and repeated ones; queries repeat words, too."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, 301)
    draw = lambda most: " ".join(f"w{word}" for word in rng.choice(300, rng.integers(most + 1), p=share / share.sum()))  # noqa: E731
    passages = [draw(12) for _ in range(num_passages)]
    passages[1::7] = passages[0::7][: len(passages[1::7])]
    queries = [draw(5) for _ in range(num_queries)]
    return corpus(passages, [*queries, "", "unheard w3 w3 w3 w7", "unheard of"])


def plain_scores(data):
    """BM25 in float64, (Q, N), without the constant factor k1 + 1, as Lucene has it."""
    passages = [Counter(split_words(text)) for text in data.corpus["text"]]
    lengths = [sum(each.values()) for each in passages]
    mean, df = sum(lengths) / len(lengths), Counter(word for each in passages for word in each)

    def score(query, passage, length):
        norm, total = 1.5 * (1 - 0.75 + 0.75 * length / mean), 0.0
        for word in query:
            idf = math.log(1 + (len(passages) - df[word] + 0.5) / (df[word] + 0.5))
            total += idf * passage[word] / (passage[word] + norm)
        return total

    queries = [split_words(text) for text in data.queries["text"]]
    return np.array([[score(query, *pair) for pair in zip(passages, lengths, strict=True)] for query in queries])


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


@pytest.mark.parametrize("k", [1, 7, 300])
def test_scores_ranks_and_ties_are_those_of_a_plain_version(k):
    data = made_up(200, 40)
    scores, ids = bm25_top_k(data, np.arange(43), k)
    for place, plain_N in enumerate(plain_scores(data)):
        num = min(k, int((plain_N > 0).sum()))
        order = np.lexsort((np.arange(200), -np.round(plain_N, 9)))[:num]  # as many digits as no two different scores share
        assert ids[place].tolist() == order.tolist() + [-1] * (k - num)
        np.testing.assert_allclose(scores[place, :num], plain_N[order], rtol=1e-6)
        assert (scores[place, num:] == -np.inf).all()
    assert (scores[:, 0] > 0).sum() > 30 and (ids[[40, 42]] == -1).all()
    assert k == 1 or ((scores[:, 1:] == scores[:, :-1]) & (ids[:, 1:] >= 0)).sum() > 20, "hardly any scores are equal"


def test_the_library_of_the_formula_finds_the_same():
    data = made_up(300, 60, seed=1)
    index = bm25s.BM25(backend="numpy")
    index.index([split_words(text) for text in data.corpus["text"]], show_progress=False)
    scores, ids = bm25_top_k(data, np.arange(60), 20)
    for place, text in enumerate(data.queries["text"][:60]):
        known = index.get_tokens_ids(split_words(text))
        score_N = index.get_scores_from_ids(known) if len(known) else np.zeros(300, np.float32)
        best = np.sort(score_N)[::-1][:20]
        np.testing.assert_allclose(np.where(ids[place] < 0, 0, scores[place]), best, rtol=1e-5)


def test_scores_are_the_same_to_the_bit_however_the_corpus_is_divided():
    data = made_up(500, 100)
    queries = number_words(read_texts(data.queries, np.arange(103)))
    ids_n = np.arange(500, dtype=np.int32)
    found, scored = set(), set()
    for num_parts in (1, 2, 3, 10):
        rows = [*(part_of(500, part, num_parts) for part in range(num_parts)), range(0)]  # and a rank without any
        counts = [count_words(data.corpus, own, queries.number_of) for own in rows]
        statistics = np.sum([each.statistics for each in counts], axis=0)
        parts = [Search(each.weigh(statistics), 9) for each in counts]
        each = [part.all(queries.of, range(103)) for part in parts]
        scores, ids = merge_top_k([(s, np.where(i < 0, -1, i + own.start)) for (s, i), own in zip(each, rows, strict=True)], 9)
        found.add(scores.tobytes() + ids.tobytes())
        pairs = [part.postings.score(queries.of(41), ids_n[: len(own)]) for part, own in zip(parts, rows, strict=True)]
        scored.add(np.concatenate(pairs).tobytes())
    assert len(found) == len(scored) == 1
    assert (scores.tobytes(), ids.tobytes()) == tuple(each.tobytes() for each in bm25_top_k(data, np.arange(103), 9))


def test_what_is_left_out_of_a_search_is_not_among_the_best(monkeypatch):
    data = made_up(3000, 200)
    queries = number_words(read_texts(data.queries, np.arange(203)))
    counts = count_words(data.corpus, range(3000), queries.number_of)
    search, seen = Search(counts.weigh(counts.statistics), 10), []
    monkeypatch.setattr(Postings, "score", lambda *args, _plain=Postings.score: seen.append(len(args[2])) or _plain(*args))
    scores, ids = search.all(queries.of, range(203))
    assert sum(seen) < 0.1 * 203 * 3000
    all_n = np.arange(3000, dtype=np.int32)
    for place in range(203):
        scores_N = search.postings.score(queries.of(place), all_n)
        best = np.argsort(-scores_N, kind="stable")[:10]
        best = best[scores_N[best] > 0]
        assert ids[place, : len(best)].tolist() == best.tolist() and (ids[place, len(best) :] == -1).all()
        assert (scores[place, : len(best)] == scores_N[best]).all()
    assert search.postings.docs.dtype == np.int32 and search.postings.weights.dtype == np.float32


def test_memory_of_a_query_is_that_of_its_words_postings():
    num_docs = 100_000
    docs = np.concatenate([np.arange(num_docs), np.arange(0, num_docs, 1000)]).astype(np.int32)  # a word of all, a rare one
    weights = np.repeat(np.array([0.1, 5], np.float32), [num_docs, 100])
    search, sums_N = (
        Search(Postings(num_docs, np.array([0, num_docs, len(docs)]), docs, weights), 10),
        np.zeros(num_docs, np.float32),
    )
    tracemalloc.start()
    scores, found = search.one((np.array([0, 1], np.int32), np.ones(2, np.float32)), sums_N)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < num_docs / 4 and not sums_N.any()
    assert found.tolist() == list(range(0, 10_000, 1000)) and (scores == np.float32(5.1)).all()


def test_a_search_ends_when_it_is_told_to():
    data = made_up(50, 300)
    queries = number_words(read_texts(data.queries, np.arange(303)))
    counts = count_words(data.corpus, range(50), queries.number_of)
    told = []

    def go_on(done):
        told.append(done)
        if len(told) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        Search(counts.weigh(counts.statistics), 5).all(queries.of, range(303), go_on)
    assert told == [64, 128]


def test_held_out_documents_count_and_are_not_found():
    data = corpus(["sort a", "sort b", "sort c"], ["sort"])
    scores, ids = bm25_top_k(data, np.array([0]), 5, np.array([True, False, True]))
    assert ids.tolist() == [[0, 2, -1, -1, -1]]
    assert scores[0, 0] == bm25_top_k(data, np.array([0]), 1)[0]


@pytest.mark.parametrize("passages", [["", "()"], ["other", "words"]])
@pytest.mark.parametrize("query", ["sort", ""])
def test_texts_without_a_common_word_are_no_results(passages, query):
    assert (bm25_top_k(corpus(passages, [query]), np.array([0]), 3)[1] == -1).all()
