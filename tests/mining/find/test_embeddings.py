"""Settings of the encoder, and embeddings that are not finite."""

import json
import re

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mining.find.embeddings import Embeddings, encode_together
from mining.ranks import GivenUp, Ranks
from tests.mining.run import make_job, publish_checkpoint
from tests.mining.test_service import manifest, mine
from tests.tiny import TOPICS, VOCABULARY, write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.encoder.encode import encode_rows
from trainer.encoder.missing import Texts
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.settings import EncodeSettings
from trainer.encoder.shards import open_shards
from trainer.encoder.tokens import tokenize


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=str(write_tiny_encoder(folder / "encoder"))))
    corpus = open_dataset(write_tiny_dataset(folder / "data", num_queries=300), folder / "cache").corpus
    return encoder, tokenize(corpus, tokenizer, prefix="", max_tokens=32, cache=folder / "cache")


def encode(shards, encoder, tokens):
    encode_together(Ranks(MPI.COMM_SELF, lambda: False), [Texts(shards, encoder, tokens)], lambda done, total: None)


def test_stored_halves_and_bfloat16_are_near_and_kept_apart(tmp_path, passages):
    encoder, tokens = passages
    exact = encode_rows(encoder, tokens, np.arange(len(tokens.lengths)))
    folders = set()
    # Unit vectors: half a unit in the last place of 11 and of 8 bits, the second once in every layer.
    for settings, tolerance in (({}, 0), ({"stored": "fp16"}, 2**-11), ({"dtype": "bf16"}, 0.05)):
        shards = open_shards(tmp_path, "weights", "mean", tokens, encoder, "passage", EncodeSettings(**settings))
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
    shards = open_shards(tmp_path, "weights", "mean", tokens, encoder, "passage")
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
