"""Token tables: the tokenizer's own ids, made once, found by content."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.encoder import tokens as tokens_module
from trainer.encoder.tokens import tokenize


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
