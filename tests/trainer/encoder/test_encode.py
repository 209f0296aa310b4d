"""Embeddings of many texts: to the bit those of padding each batch by itself, and close to them where batches are packed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from gradcache.chunks import plan_chunks
from tests.allocator import Memory
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.encoder import encode, fit, shards
from trainer.encoder.encode import Batches, encode_rows
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.tokens import tokenize


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode")
    write_tiny_encoder(folder / "encoder")
    write_tiny_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module", params=[True, False])
def tokens(root, request):
    tokenizer = AutoTokenizer.from_pretrained(root / "encoder")
    corpus = open_dataset(root / "data", root / "cache").corpus
    options = {"prefix": "read ", "max_tokens": 32, "include_prompt": request.param}
    return tokenize(corpus, tokenizer, **options, cache=root / "cache")


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(encode, "ENCODE_TOKENS", 120)


def encoder_of(root, pooling="mean"):
    return load_encoder(ModelSettings(name=str(root / "encoder"), pooling=pooling))[0]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_those_of_padded_batches_to_the_bit(root, tokens, pooling, dtype):
    encoder = encoder_of(root, pooling).eval()
    rows = np.random.default_rng(0).integers(0, len(tokens.lengths), 70)
    wanted, counts, seen = np.zeros((70, encoder.width), np.float32), [], []
    for chunk in plan_chunks(torch.as_tensor(tokens.lengths[rows]), 120):
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            wanted[chunk] = encoder(tokens.pad(rows[chunk.numpy()])).float().numpy()
        counts.append(len(chunk))
    encoder.train()
    np.testing.assert_array_equal(encode_rows(encoder, tokens, rows, seen.append, dtype), wanted)
    assert seen == counts and len(counts) > 5 and encoder.training and wanted.any(1).all()


@pytest.mark.usefixtures("small_batches")
def test_packed_batches_give_the_embeddings_of_padded_ones(root, tokens, monkeypatch):
    encoder, rows = encoder_of(root), np.arange(len(tokens.lengths))
    wanted, taken = encode_rows(encoder, tokens, rows), []
    monkeypatch.setattr(encode, "packs", lambda *_: True)
    encoder.register_forward_pre_hook(lambda _, args: taken.append(len(args[0]["input_ids"])))
    np.testing.assert_allclose(encode_rows(encoder, tokens, rows), wanted, atol=1e-6)
    assert sum(taken) == tokens.lengths.sum() and len(taken) == -(-sum(taken) // 120), "nothing but tokens, in the fewest batches"


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_embeddings_that_stay_on_the_device_are_the_same_rounded(root, tokens, stored):
    encoder, rows = encoder_of(root), np.random.default_rng(0).integers(0, len(tokens.lengths), 70)
    wanted, counts, told = encode_rows(encoder, tokens, rows), [], []
    with ThreadPoolExecutor(1) as reader:
        batches = Batches(encoder, tokens, rows, torch.float32, reader)
        found = batches.embed(stored, counts.append, lambda: told.append(len(counts)))
    np.testing.assert_array_equal(found.numpy(), wanted.astype(found.numpy().dtype))
    assert found.dtype == stored and not found.is_inference() and sum(counts) == 70 and encoder.training
    assert told == [len(counts) - 1], "before the last batch"


def test_embeddings_of_packed_and_of_padded_batches_are_kept_apart(root, tokens, tmp_path, monkeypatch):
    folders = set()
    for is_packed in (False, True):
        monkeypatch.setattr(shards, "packs", lambda *_, is_packed=is_packed: is_packed)
        folders.add(shards.open_shards(tmp_path, "weights", "mean", tokens, encoder_of(root), "passage").folder)
    assert len(folders) == 2


@pytest.mark.usefixtures("small_batches")
def test_an_encoder_that_fails_leaves_no_thread_behind(root, tokens):
    before = set(threading.enumerate())

    def fail(*_):
        raise RuntimeError("broken")

    encoder = encoder_of(root)
    encoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        encode_rows(encoder, tokens, np.arange(40))
    # A thread of an earlier test may still be on its way out of the list, so only new ones count.
    assert not set(threading.enumerate()) - before and encoder.training


def test_batches_that_do_not_fit_into_memory_are_halved_and_give_the_same_embeddings(root, tokens, monkeypatch):
    monkeypatch.setattr(fit, "_fitting", {})
    encoder, rows = encoder_of(root), np.arange(len(tokens.lengths))
    with Memory() as memory:
        wanted = encode_rows(encoder, tokens, rows)
    with Memory(limit=memory.peak // 3) as memory:
        found = encode_rows(encoder, tokens, rows)
    assert memory.num_refused and fit.halved_to() < tokens.lengths.sum()
    np.testing.assert_allclose(found, wanted, atol=1e-6)
