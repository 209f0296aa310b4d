"""Several sources become one data set; each keeps its own prefixes, limits and batches."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.clusters import Clusters, write_clusters
from trainer.data.collate import GIVEN, RowEncoder, choose_passages, collate, given_negatives, training_set
from trainer.data.datasets import open_data, open_dataset
from trainer.data.order import build_order
from trainer.data.sampler import step_parts
from trainer.data.texts import join_keys
from trainer.encoder import tokens as tokens_module
from trainer.encoder.model import Traits
from trainer.encoder.tokens import tokenize_side
from trainer.errors import InputError
from trainer.handoff.negatives import Negatives
from trainer.handoff.settings import DataSettings, SourceSettings

TRAITS = Traits(
    pooling="mean", normalize=True, query_prefix="the ", passage_prefix="", max_query_tokens=8, max_passage_tokens=16
)  # fmt: skip


def write_pairs(path, rows):
    records = [{"anchor": a, "positive": p, "negative": n, "scores": [0.9, 0.1 * i]} for i, (a, p, n) in enumerate(rows)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    write_tiny_dataset(root / "beir", num_queries=48)
    write_pairs(root / "pairs.jsonl", [("sort", "a list", "a tree"), ("open", "a file", "a list"), ("hash", "a key", "a tree")])
    write_pairs(root / "more.jsonl", [("sort", "a list", "a graph"), ("parse", "the json", "a list")])
    write_tiny_encoder(root / "encoder")
    return root


def source(folder, name, **more):
    return SourceSettings(path=folder / name, **more)


def opened(folder, **sources):
    return open_data(DataSettings(cache=folder / "cache"), sources)


def judged(data):
    """(query text, passage text, teacher's score) of all training judgements."""
    queries, corpus, qrels = data.queries["text"], data.corpus["text"], data.qrels["train"]
    rows = zip(qrels.query_rows, qrels.corpus_rows, qrels.teacher, strict=True)
    return sorted((queries[int(q)], corpus[int(p)], str(round(float(t), 3))) for q, p, t in rows)


def test_sources_keep_their_texts_and_judgements_and_share_passages(folder):
    names = {"beir": "beir", "pairs": "pairs.jsonl", "more": "more.jsonl"}
    parts = [open_dataset(folder / path, folder / "cache") for path in names.values()]
    data = opened(folder, **{name: source(folder, path) for name, path in names.items()})
    assert judged(data) == sorted(row for part in parts for row in judged(part))
    assert len(data.queries) == sum(len(part.queries) for part in parts), "a query stays with its source"
    assert len(data.corpus) == sum(len(part.corpus) for part in parts) - 1, "the list is one passage"
    assert len(set(data.corpus["_id"])) == len(data.corpus)
    assert set(data.qrels) == {"train", "dev", "test"}
    for number, part in enumerate(parts):
        rows = np.flatnonzero(data.source_of("queries", np.arange(len(data.queries))) == number)
        assert data.queries.select(rows)["text"] == part.queries["text"]
        assert data.sources[number].first_query == rows[0]
    assert data.corpus["text"][data.sources[2].first_passage :] == ["a graph", "the json"]


def test_given_negatives_follow_their_queries_and_mined_scores_are_no_teachers(folder):
    data = opened(folder, beir=source(folder, "beir"), pairs=source(folder, "pairs.jsonl"), more=source(folder, "more.jsonl"))
    given = given_negatives(data, "train")
    assert given.version == GIVEN and given.num_queries == len(data.training_queries())
    texts = [data.corpus["text"][int(row)] for row in given.ids]
    assert texts == ["a tree", "a list", "a tree", "a graph", "a list"]
    assert np.diff(given.indptr)[-5:].tolist() == [1] * 5 and given.indptr[-6] == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    tables = [tokenize_side(data, side, tokenizer, TRAITS) for side in ("queries", "corpus")]
    dataset = training_set(data, "train", tables[0].select(data.training_queries()), tables[1])
    query_n = np.array([given.num_queries - 4, 0, given.num_queries - 1])
    chosen = choose_passages(dataset, given, query_n, 3, 0, 0)
    assert chosen.query.tolist() == [0, 1, 2, 0, 2]
    np.testing.assert_allclose(chosen.teacher, [0.9, np.nan, 0.9, 0.1, 0.1], rtol=1e-6)
    mined = Negatives(given.indptr, given.ids, given.scores, 4, {})
    chosen = choose_passages(dataset, mined, query_n, 3, 0, 0)
    assert np.isnan(chosen.teacher[3:]).all()
    scored = dataclasses.replace(mined, teacher_scores=np.arange(len(given.ids), dtype=np.float32))
    assert choose_passages(dataset, scored, query_n, 3, 0, 0).teacher[3:].tolist() == [1, 4]
    assert chosen.rows[3:].tolist() == given.ids[[1, 4]].tolist()


def test_each_source_is_tokenised_by_its_own_rule_in_one_table(folder, monkeypatch):
    own = {"query_prefix": "of each ", "max_query_tokens": 5, "passage_prefix": "not ", "max_passage_tokens": 6}
    data = opened(folder, beir=source(folder, "beir"), pairs=source(folder, "pairs.jsonl", **own))
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    rules = {"queries": [("the ", 8), ("of each ", 5)], "corpus": [("", 16), ("not ", 6)]}
    for side, texts in (("queries", data.queries), ("corpus", data.corpus)):
        table = tokenize_side(data, side, tokenizer, TRAITS)
        rows = np.arange(len(texts))
        padded = table.pad(rows)
        for row, number in zip(rows, data.source_of(side, rows), strict=True):
            prefix, limit = rules[side][number]
            expected = tokenizer(prefix + texts[int(row)]["text"], truncation=True, max_length=limit)["input_ids"]
            assert padded["input_ids"][row, : len(expected)].tolist() == expected
            assert table.lengths[row] == len(expected)
    monkeypatch.setattr(tokens_module, "_build", lambda *_: pytest.fail("tokenised again"))
    assert tokenize_side(data, "corpus", tokenizer, TRAITS).digest == table.digest
    other = opened(folder, beir=source(folder, "beir"), pairs=source(folder, "pairs.jsonl", **own | {"passage_prefix": "or "}))
    with pytest.raises(pytest.fail.Exception, match="tokenised again"):
        tokenize_side(other, "corpus", tokenizer, TRAITS)


def test_equal_texts_behind_different_prefixes_are_known_to_be_equal(folder):
    own = {"id_prefix": "b/", "query_prefix": "of each ", "passage_prefix": "not "}
    data = opened(folder, a=source(folder, "beir"), b=source(folder, "beir", **own))
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    queries, passages = (tokenize_side(data, side, tokenizer, TRAITS) for side in ("queries", "corpus"))
    dataset = training_set(data, "train", queries.select(data.training_queries()), passages)
    half = dataset.num_queries // 2
    query_n = np.array([0, half, 1])  # one text twice, and another
    batch = collate(dataset, None, query_n, RowEncoder(print, torch.device("cpu")), per_query=0, seed=0, step=0)
    keys, inputs = batch.keys.tolist(), batch.towers[0].encode_keys.tolist()
    assert keys[0] == keys[1] != keys[2] and len(set(inputs[:3])) == 3, "they are encoded apart"
    positives = batch.positive_keys
    first, again, _ = (set(keys.tolist()) for keys in positives.values_m.split(positives.counts_n.tolist()))
    assert first == again and set(keys[3:5]) <= first, "either's positive is known to the other"
    assert inputs[3] != inputs[4]
    conflicts = build_order(data, dataset, "train", seed=0, batch=8, avoid_duplicates=True).conflicts
    place, _ = conflicts.shared(np.array([0, half]))
    assert np.bincount(place).tolist() == [1 + len(first)] * 2


@pytest.mark.parametrize("seed", range(3))
def test_joined_keys_are_equal_along_chains_of_equal_ones(seed):
    random = np.random.default_rng(seed)
    keys, others = random.integers(0, 40, 60), random.integers(100, 140, 60)
    plain = np.arange(60)
    for _ in range(60):
        for i, j in zip(*np.nonzero((keys[:, None] == keys) | (others[:, None] == others)), strict=True):
            plain[i] = plain[j] = min(plain[i], plain[j])
    found = join_keys(keys, others)
    np.testing.assert_array_equal(found[:, None] == found, plain[:, None] == plain)
    assert 1 < len(set(found.tolist())) < 40 and len(join_keys(keys[:0], others[:0])) == 0


def test_an_id_for_two_texts_is_refused_and_a_prefix_mends_it(folder):
    write_tiny_dataset(folder / "other", num_queries=12, seed=5)
    sentence = r"beir and .*other have the passage id 'd0-0' for different texts; set sources\.b\.id_prefix, to 'b/' for example"
    with pytest.raises(InputError, match=sentence) as error:
        opened(folder, a=source(folder, "beir"), b=source(folder, "other"))
    assert "\n" not in str(error.value)
    data = opened(folder, a=source(folder, "beir"), b=source(folder, "other", id_prefix="b/"))
    assert "b/d0-0" in data.corpus["_id"] and "b/q0" in data.queries["_id"] and "q0" in data.queries["_id"]
    # The same folder twice: all its passages are one, its queries are two.
    twice = opened(folder, a=source(folder, "beir"), b=source(folder, "beir", query_prefix="x "))
    assert len(twice.corpus) == 64 and len(twice.queries) == 96
    assert twice.positives(np.array([0, 48]))[1].tolist() == [0, 1, 0, 1]


def test_an_unchanged_combination_is_not_made_again(folder, monkeypatch):
    sources = {"a": source(folder, "pairs.jsonl"), "b": source(folder, "more.jsonl", id_prefix="z")}
    first = opened(folder, **sources)
    monkeypatch.setattr("trainer.data.datasets.combine_sources", lambda *_: pytest.fail("combined again"))
    assert opened(folder, **sources).digest == first.digest


def make_order(folder, data, **batch):
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    queries, passages = (tokenize_side(data, side, tokenizer, TRAITS) for side in ("queries", "corpus"))
    dataset = training_set(data, "train", queries.select(data.training_queries()), passages)
    return dataset, build_order(data, dataset, "train", seed=0, **batch)


def test_the_order_of_a_job_has_the_sources_of_its_data(folder):
    data = opened(folder, beir=source(folder, "beir", batch=12), pairs=source(folder, "pairs.jsonl"))
    dataset, order = make_order(folder, data, batch=8, mode="tasks")
    num_beir = dataset.num_queries - 3
    assert [tuple(source) for source in order.sources] == [(0, num_beir, 12, 1.0), (num_beir, 3, 8, 1.0)]
    first, second = step_parts(order, 0)
    assert len(first.rows) == 12 and sorted(second.rows) == [num_beir, num_beir + 1, num_beir + 2]
    of_source = data.source_of("queries", data.training_queries())
    assert set(of_source[first.rows]) == {0} and set(of_source[second.rows]) == {1}


def test_the_order_takes_clusters_and_duplicates_from_where_the_job_says(folder, tmp_path):
    data = opened(folder, a=source(folder, "pairs.jsonl"), b=source(folder, "more.jsonl"))
    dataset, order = make_order(folder, data, batch=2, avoid_duplicates=True)
    assert dataset.num_queries == 5
    for step in range(6):
        texts = [data.queries["text"][row] for row in step_parts(order, step)[0].rows]
        assert len(set(texts)) == len(texts)
    write_clusters(tmp_path / "clusters.npz", Clusters(np.array([0, 0, 1, 1, 2]), 1))
    _, order = make_order(folder, data, batch=2, clusters=tmp_path / "clusters.npz")
    assert sorted(sorted(step_parts(order, step)[0].rows.tolist()) for step in range(3)) == [[0, 1], [2, 3], [4]]


def test_a_source_without_training_queries_is_named(folder):
    (folder / "dev.jsonl").write_text((folder / "more.jsonl").read_text())
    data = opened(folder, beir=source(folder, "beir"), late=source(folder, "dev.jsonl"))
    with pytest.raises(InputError, match=r"dev\.jsonl has no query with a positive in the split 'train'; .*sources\.late"):
        make_order(folder, data, batch=4)
