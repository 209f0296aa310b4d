"""Folders as sentence-transformers saves them, and embeddings of a few texts, there and here."""

import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from tests.trainer.encoder.families import TEXTS
from trainer.encoder.encode import encode_rows
from trainer.encoder.model import ModelSettings, check_model, load_encoder, load_text_rules, save_encoder, weights_digest
from trainer.encoder.tokens import tokenize
from trainer.encoder.towers import SIDES

WIDTH = 32
TEXTS = [*TEXTS, "Sort A List", "read the line of one file by key and hash " * 4]


def load(folder, **settings):
    return load_encoder(ModelSettings(name=str(folder), **settings))


def build(folder, *modules, **options):
    """Write a folder as sentence-transformers saves one, with random weights that are not those of a start."""
    model = SentenceTransformer(modules=list(modules), device="cpu", **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in modules[1:]:
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save(str(folder), create_model_card=False)
    return folder


def theirs(folder, normalize):
    """Return what sentence-transformers makes of the texts as queries, and as documents."""
    model = SentenceTransformer(str(folder), device="cpu")
    return [encode(TEXTS, normalize_embeddings=normalize) for encode in (model.encode_query, model.encode_document)]


def ours(encoder, tokenizer, traits, cache):
    """Return what we make of the texts as queries, and as passages, by the way that every command goes."""
    texts = Dataset.from_dict({"text": TEXTS})
    found = []
    for side in SIDES:
        prefix, max_tokens = getattr(traits, f"{side}_prefix"), getattr(traits, f"max_{side}_tokens")
        options = {"prefix": prefix, "max_tokens": max_tokens, "include_prompt": traits.include_prompt}
        tokens = tokenize(texts, tokenizer, **options, cache=cache)
        found.append(encode_rows(encoder.side(side), tokens, np.arange(len(TEXTS))))
    return found


def assert_equal(found, wanted):
    for mine, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-6 * max(1, np.abs(other).max()))


def assert_means_the_same(folder, tmp_path, **settings):
    """Compare a folder's embeddings here and there, then those of what training makes of it, and what is saved."""
    encoder, tokenizer, traits = load(folder, **settings)
    start = ours(encoder, tokenizer, traits, tmp_path / "cache")
    assert_equal(start, theirs(folder, traits.normalize))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trained = ours(encoder, tokenizer, traits, tmp_path / "cache")
    assert np.abs(trained[0] - start[0]).max() > 1e-3
    saved = tmp_path / "saved"
    saved.mkdir()
    save_encoder(saved, encoder, tokenizer, traits)
    assert_equal(trained, theirs(saved, traits.normalize))
    again, tokenizer_again, traits_again = load(saved)
    assert traits_again == traits and weights_digest(again) == weights_digest(encoder)
    assert_equal(ours(again, tokenizer_again, traits_again, tmp_path / "cache"), trained)
    assert load_text_rules(ModelSettings(name=str(saved)))[1].query_prefix == traits.query_prefix
    check_model(str(folder))
    return encoder, traits


def edit(path: Path, **values):
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **values}))
