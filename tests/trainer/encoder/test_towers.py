"""Two towers: each side has its own weights, here, in the folder, in sentence-transformers, and in the shards."""

import json
import logging

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.encoder.families import TEXTS, write_family
from tests.trainer.worlds import world_of
from trainer.data.datasets import open_dataset
from trainer.encoder.model import ModelSettings, check_model, load_encoder, save_encoder, weights_digest
from trainer.encoder.towers import SIDES, TwoTowers
from trainer.errors import InputError
from trainer.evaluate import evaluate


def load(folder, **settings):
    return load_encoder(ModelSettings(name=str(folder), **settings))


def parted(encoder):
    """Move every trained parameter, so that the towers differ."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


def embed(encoder, tokenizer, side, texts=TEXTS):
    with torch.inference_mode():
        return encoder.eval()(dict(tokenizer(texts, padding=True, return_tensors="pt")), side=side)


def save(folder, encoder, tokenizer, traits):
    folder.mkdir()
    save_encoder(folder, encoder, tokenizer, traits)
    return folder


@pytest.mark.parametrize("family", ["bert", "mpnet", "qwen3", "llama"])
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2, "projection": 9, "pooling": "weighted_mean"}])
def test_two_towers_are_saved_and_found_by_us_and_by_sentence_transformers(tmp_path, family, settings, caplog):
    folder = write_family(tmp_path / "model", family)
    encoder, tokenizer, traits = load(folder, towers="two", query_prefix="read ", **settings)
    start = {side: embed(encoder, tokenizer, side) for side in SIDES}
    assert torch.equal(start["query"], start["passage"])
    with caplog.at_level(logging.WARNING):
        saved = save(tmp_path / "saved", parted(encoder), tokenizer, traits)
    again, tokenizer_again, traits_again = load(saved)
    theirs = SentenceTransformer(str(saved), device="cpu")
    assert isinstance(again, TwoTowers) and traits_again == traits and weights_digest(again) == weights_digest(encoder)
    for side, encode, prefix in zip(SIDES, (theirs.encode_query, theirs.encode_document), ("read ", ""), strict=True):
        texts = [prefix + text for text in TEXTS]
        wanted = embed(encoder, tokenizer, side, texts)
        torch.testing.assert_close(embed(again, tokenizer_again, side, texts), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(encode(TEXTS, convert_to_tensor=True), wanted, rtol=0, atol=1e-5)
        assert not torch.allclose(wanted, start[side], atol=1e-2)
    assert not torch.allclose(embed(encoder, tokenizer, "query"), embed(encoder, tokenizer, "passage"), atol=1e-2)
    with pytest.raises(ValueError, match="side=query or passage"):
        embed(encoder, tokenizer, None)
    check_model(str(saved))
    AutoModel.from_pretrained(saved / "query")
    said = json.loads((saved / "negpool.json").read_text())["not_expressed"]
    assert said == ["AutoModel loads one tower at a time, from the folders query and document"]


def test_a_tower_of_a_saved_model_is_a_model_of_its_own(tmp_path):
    encoder, tokenizer, traits = load(write_family(tmp_path / "model", "bert"), towers="two")
    saved = save(tmp_path / "saved", parted(encoder), tokenizer, traits)
    for side, name in zip(SIDES, ("query", "document"), strict=True):
        with torch.inference_mode():
            found = load(saved / name)[0].eval()(tokenizer(TEXTS, padding=True, return_tensors="pt"))
        assert torch.equal(found, embed(encoder, tokenizer, side))


def test_each_side_is_evaluated_by_its_own_tower_and_kept_apart(tmp_path):
    data = open_dataset(write_tiny_dataset(tmp_path / "data"), tmp_path / "cache")
    folder = write_tiny_encoder(tmp_path / "encoder")
    encoder, tokenizer, traits = load(folder, towers="two")

    def figures(encoder, shards):
        found = evaluate(world_of(), data, "test", encoder, tokenizer, traits, tmp_path / shards)
        return found, len(list((tmp_path / shards).glob("[!.]*")))

    tied = load(folder)[0]
    assert figures(encoder, "a") == figures(tied, "b") == (figures(tied, "b")[0], 2)
    parted(encoder.passage)
    one_moved = figures(encoder, "c")[0]
    assert one_moved != figures(tied, "b")[0]
    tied.load_state_dict(encoder.passage.state_dict())
    assert one_moved != figures(tied, "d")[0]
    table = np.load(next((tmp_path / "c").glob("*/shard-*/embeddings.npy")))
    assert np.isfinite(table).all()


def test_a_folder_that_is_not_what_the_job_says_is_one_sentence(tmp_path):
    encoder, tokenizer, traits = load(write_family(tmp_path / "model", "bert"), towers="two")
    saved = save(tmp_path / "saved", encoder, tokenizer, traits)
    with pytest.raises(InputError, match=r"has two towers; leave model\.towers out"):
        load(saved, towers="one")
    (saved / "query" / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no whole model in the folder query; set model\.name"):
        load(saved)
