"""Token tables: the tokenizer's own ids, made once, found by content."""

import dataclasses
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.encoder import token_file
from trainer.encoder import tokens as tokens_module
from trainer.encoder.model import Traits
from trainer.encoder.tokens import tokenize, tokenize_side


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokens")
    data = open_dataset(write_tiny_dataset(root / "data"), root / "cache")
    return data.corpus, AutoTokenizer.from_pretrained(write_tiny_encoder(root / "encoder")), root


def test_the_ids_are_the_tokenizers(setting):
    corpus, tokenizer, root = setting
    table = tokenize(corpus, tokenizer, prefix="read ", max_tokens=8, cache=root / "cache")
    rows = np.array([3, 0, 40, 3])
    padded = table.pad(rows)
    texts = ["read " + corpus[int(row)]["text"] for row in rows]
    wanted = tokenizer(texts, truncation=True, max_length=8, padding=True, return_tensors="pt")
    assert padded["input_ids"].equal(wanted["input_ids"])
    assert padded["attention_mask"].equal(wanted["attention_mask"])
    assert table.lengths[rows].tolist() == wanted["attention_mask"].sum(1).tolist()
    assert table.num_truncated == sum(len(tokenizer("read " + text)["input_ids"]) > 8 for text in corpus["text"])


def test_equal_tokens_have_equal_keys_and_others_do_not(setting):
    corpus, tokenizer, root = setting
    table = tokenize(corpus, tokenizer, prefix="", max_tokens=32, cache=root / "cache")
    ids = [tuple(tokenizer(text)["input_ids"]) for text in corpus["text"]]
    keys = table.keys(np.arange(len(ids)))
    assert len(set(ids)) < len(ids), "the data holds repeated texts"
    assert len({*zip(ids, keys.tolist(), strict=True)}) == len(set(ids)) == len(set(keys.tolist()))


def test_nothing_is_tokenised_twice_and_anything_that_matters_is_tokenised_anew(setting, monkeypatch):
    corpus, tokenizer, root = setting
    first = tokenize(corpus, tokenizer, prefix="", max_tokens=9, cache=root / "cache")
    monkeypatch.setattr(tokens_module, "_build", lambda *_: pytest.fail("tokenised again"))
    assert tokenize(corpus, tokenizer, prefix="", max_tokens=9, cache=root / "cache").digest == first.digest
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["normalizer"] = None
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer.__class__.from_str(json.dumps(rules)))
    for change in (
        lambda: tokenize(corpus, tokenizer, prefix="x ", max_tokens=9, cache=root / "cache"),
        lambda: tokenize(corpus, tokenizer, prefix="", max_tokens=10, cache=root / "cache"),
        lambda: tokenize(corpus.select(range(5)), tokenizer, prefix="", max_tokens=9, cache=root / "cache"),
        lambda: tokenize(corpus, other, prefix="", max_tokens=9, cache=root / "cache"),
    ):
        with pytest.raises(pytest.fail.Exception, match="tokenised again"):
            change()


def test_no_rows_pad_to_nothing(setting):
    corpus, tokenizer, root = setting
    table = tokenize(corpus, tokenizer, prefix="", max_tokens=9, cache=root / "cache")
    assert table.pad(np.array([], np.int64))["input_ids"].shape == (0, 0)


def test_a_selection_has_the_tokens_of_its_rows_and_a_digest_of_its_own(setting):
    corpus, tokenizer, root = setting
    table = tokenize(corpus, tokenizer, prefix="", max_tokens=9, cache=root / "cache")
    rows = np.array([7, 3, 3, 40])
    chosen = table.select(rows)
    again = chosen.select(np.array([3, 0]))
    for found, expected in ((chosen.pad(np.arange(4)), table.pad(rows)), (again.pad(np.arange(2)), table.pad(rows[[3, 0]]))):
        assert found["input_ids"].equal(expected["input_ids"]) and found["attention_mask"].equal(expected["attention_mask"])
    assert chosen.keys(np.arange(4)).tolist() == table.keys(rows).tolist()
    assert len({table.digest, chosen.digest, again.digest, table.select(rows[::-1]).digest}) == 4
    assert table.select(np.arange(len(corpus))).digest == table.digest


def test_the_table_of_an_opened_data_set_is_found_without_its_texts(setting, monkeypatch):
    _, tokenizer, root = setting
    data = open_dataset(root / "data", root / "cache")
    limits = {"max_query_tokens": 8, "max_passage_tokens": 8}
    traits = Traits(pooling="mean", normalize=True, query_prefix="", passage_prefix="a ", **limits)
    made = tokenize_side(data, "corpus", tokenizer, traits)
    texts = [tokenizer("a " + text, truncation=True, max_length=8)["input_ids"] for text in data.corpus["text"]]
    assert [len(text) for text in texts] == made.lengths.tolist()
    monkeypatch.setattr(tokens_module, "_build", lambda *_: pytest.fail("tokenised again"))
    no_texts = dataclasses.replace(data, corpus=None)
    assert tokenize_side(no_texts, "corpus", tokenizer, traits).digest == made.digest


def test_several_processes_make_the_same_table(setting, tmp_path, monkeypatch):
    corpus, tokenizer, root = setting
    monkeypatch.setattr(token_file, "ROWS_OF_BATCH", 10)
    tables = []
    for num_proc in (1, 2):
        cache = tmp_path / str(num_proc)
        data = dataclasses.replace(open_dataset(root / "data", root / "cache"), num_proc=num_proc, cache=cache)
        limits = {"max_query_tokens": 8, "max_passage_tokens": 8}
        traits = Traits(pooling="mean", normalize=True, query_prefix="", passage_prefix="", **limits)
        tables.append(tokenize_side(data, "corpus", tokenizer, traits))
        names = {"tokens.arrow", "lengths.npy", "keys.npy", "about.json", "manifest.json"}
        assert {path.name for path in cache.glob("tokens-*/*")} == names
    rows = np.random.default_rng(0).permutation(len(corpus))
    first, second = (table.pad(rows)["input_ids"] for table in tables)
    assert first.equal(second) and tables[0].num_truncated == tables[1].num_truncated > 0


def test_a_slow_tokenizer_counts_what_it_cuts_as_well(setting):
    corpus, tokenizer, _ = setting

    class Slow:
        def __call__(self, texts, **options):
            found = tokenizer(texts, **options)
            found._encodings = None
            return found

    texts = corpus["text"][:20]
    fast, slow = (tokens_module._encode(made, texts, 12) for made in (tokenizer, Slow()))
    assert fast[1] == slow[1] and any(fast[1]) and not all(fast[1])
    assert [ids.tolist() for ids in fast[0]] == [ids.tolist() for ids in slow[0]]
