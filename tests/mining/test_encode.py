"""Leases of shards, settings of the encoder, and embeddings that are not finite."""

import json
import re

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mining.encode import Embeddings, Side, encode_missing
from mining.ranks import GivenUp, Ranks
from tests.mining.run import make_job, publish_checkpoint
from tests.mining.test_service import manifest, mine
from tests.tiny import TOPICS, VOCABULARY, write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.encoder.encode import encode_rows
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.shards import EncodeSettings, open_shards
from trainer.encoder.tokens import tokenize


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=str(write_tiny_encoder(folder / "encoder"))))
    corpus = open_dataset(write_tiny_dataset(folder / "data", num_queries=300), folder / "cache").corpus
    return encoder, tokenize(corpus, tokenizer, prefix="", max_tokens=32, cache=folder / "cache")


def encode(shards, encoder, tokens):
    side = Side("passage", shards, tokens)
    return encode_missing(Ranks(MPI.COMM_SELF, lambda: False), encoder, [side], lambda done, total: None)


def test_a_leased_shard_is_left_to_its_holder_and_a_dead_holders_is_taken(tmp_path, passages):
    encoder, tokens = passages
    shards = open_shards(tmp_path, "weights", "mean", tokens)
    assert shards.num_shards >= 3 and shards.lease(0) and not shards.lease(0) and shards.lease(1)
    # Leases end where a service begins to encode: whoever held them is gone.
    assert encode(shards, encoder, tokens) == len(tokens.lengths)
    assert shards.missing() == [] and not list(shards.folder.glob(".lease-*"))


def test_two_that_encode_at_once_share_the_shards_and_none_is_encoded_twice(tmp_path, passages, monkeypatch):
    encoder, tokens = passages
    shards = open_shards(tmp_path, "weights", "mean", tokens)
    embedded, embed = [], type(shards).embed

    def while_another_takes_the_last(self, shard, *rest):
        embedded.append(shard)
        shards.lease(shards.num_shards - 1)
        return embed(self, shard, *rest)

    monkeypatch.setattr(type(shards), "embed", while_another_takes_the_last)
    encode(shards, encoder, tokens)
    assert embedded == list(range(shards.num_shards - 1)) == sorted(set(embedded))
    assert shards.missing() == [shards.num_shards - 1]


def test_stored_halves_and_bfloat16_are_near_and_kept_apart(tmp_path, passages):
    encoder, tokens = passages
    exact = encode_rows(encoder, tokens, np.arange(len(tokens.lengths)))
    folders = set()
    # Unit vectors: half a unit in the last place of 11 and of 8 bits, the second once in every layer.
    for settings, tolerance in (({}, 0), ({"stored": "fp16"}, 2**-11), ({"dtype": "bf16"}, 0.05)):
        shards = open_shards(tmp_path, "weights", "mean", tokens, None, EncodeSettings(**settings))
        encode(shards, encoder, tokens)
        found = Embeddings(shards).read(np.arange(len(exact)))
        assert found.dtype == np.float32 and shards.read(0).dtype == (np.float16 if "stored" in settings else np.float32)
        np.testing.assert_allclose(found, shards.read_rows(np.arange(len(exact))))
        whole = np.concatenate([encode_rows(encoder, tokens, shards.rows(s)) for s in range(shards.num_shards)])
        assert np.abs(found - whole).max() <= tolerance and (np.abs(found - whole).max() > 0) == bool(settings)
        folders.add(shards.folder)
    assert len(folders) == 3


def test_a_text_without_an_embedding_is_named(tmp_path, passages):
    encoder, tokens = passages
    shards = open_shards(tmp_path, "weights", "mean", tokens)
    sort = VOCABULARY.index("sort")
    first = next(row for row in range(len(tokens.lengths)) if sort in tokens.ids.read(np.array([row])))
    weights = encoder.model.embeddings.word_embeddings.weight
    before = weights.data.clone()
    weights.data[sort] = torch.nan
    try:
        with pytest.raises(GivenUp, match=rf"the embedding of {re.escape(tokens.name(first))} is not finite, and so for \d+ of"):
            encode(shards, encoder, tokens)
    finally:
        weights.data.copy_(before)


def test_a_service_goes_by_its_encode_settings_and_a_single_query_is_enough(tmp_path):
    job = make_job(tmp_path, num_queries=1, encode={"stored": "fp16"}, mine={"bm25_top_k": 0})
    for split in ("dev", "test"):
        (tmp_path / "data" / "qrels" / f"{split}.tsv").unlink()
    with open(tmp_path / "data" / "corpus.jsonl", "a") as file:
        file.writelines(json.dumps({"_id": word, "title": "", "text": word}) + "\n" for word in TOPICS)
    publish_checkpoint(job, 10)
    mine(job)
    assert manifest(job, "v000001")["num_negatives"] == 5
    stored = [np.load(file, mmap_mode="r").dtype for file in tmp_path.glob("run/shards/*/shard-*/embeddings.npy")]
    assert set(stored) == {np.dtype(np.float16)} and len(stored) == 2
