"""What cannot be used is refused in one sentence: what was found, what was expected, which setting changes it."""

import json

import pytest
from transformers import T5Config, T5Model, ViTConfig, ViTModel

from launch.jobfile import read_job
from tests.trainer.encoder.families import write_family, write_tokenizer
from trainer.encoder.model import ModelSettings, check_model, load_encoder
from trainer.errors import InputError


def refused(message, **settings):
    with pytest.raises(InputError, match=message) as error:
        load_encoder(ModelSettings(**settings))
    assert "\n" not in str(error.value)


def test_four_bits_without_adapters_are_refused_before_anything_is_loaded():
    refused(r'model\.quantize="nf4" freezes the weights; set model\.lora_rank', name="never looked for", quantize="nf4")


def test_unknown_names_in_a_job_are_refused(tmp_path):
    (tmp_path / "job.toml").write_text("")
    for override in ("model.pooling=median", "model.attention=sideways", "model.quantize=int3"):
        with pytest.raises(InputError, match=override.replace("=", "='") + "' cannot be used; expected \""):
            read_job(tmp_path / "job.toml", [override])
    job = read_job(tmp_path / "job.toml", ['model.lora_targets=["query", "value"]', "model.lora_rank=4"]).train
    assert job.model.lora_targets == ("query", "value")


def test_an_unknown_pooling_in_a_folder_is_refused(tmp_path):
    folder = write_family(tmp_path, "bert")
    traits = {"pooling": "median", "normalize": True, "query_prefix": "", "passage_prefix": ""}
    (folder / "negpool.json").write_text(json.dumps(traits))
    refused(r"model\.pooling='median' is unknown; expected one of mean, cls,", name=str(folder))


def test_models_that_are_neither_encoder_nor_decoder_of_texts_are_refused(tmp_path):
    write_tokenizer(tmp_path / "t5", "bert")
    T5Model(T5Config(vocab_size=41, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path / "t5")
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)).save_pretrained(
        tmp_path / "vit"
    )
    for name, message in {"t5": r"encoder with a decoder \(t5\)", "vit": r"\(vit\) reads pixel_values"}.items():
        refused(message + r".*; set model\.name", name=str(tmp_path / name))
        with pytest.raises(InputError, match=message):
            check_model(str(tmp_path / name))


def test_what_a_family_cannot_do_is_refused(tmp_path):
    bert, mpnet = write_family(tmp_path / "bert", "bert"), write_family(tmp_path / "mpnet", "mpnet")
    refused(r'model\.attention="causal" cannot be had from a model of type bert', name=str(bert), attention="causal")
    refused(
        r"model\.checkpoint_activations=true cannot be had from a model of type mpnet",
        name=str(mpnet),
        checkpoint_activations=True,
    )


def test_the_longest_text_is_that_of_the_position_table(tmp_path):
    for family in ("bert", "roberta"):  # tables of 64 and 66 rows, of which RoBERTa's first two belong to padding
        folder = write_family(tmp_path / family, family)
        refused(r"model\.max_query_tokens=65 is not between 3 and 64", name=str(folder), max_query_tokens=65)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 10**30}))
        assert load_encoder(ModelSettings(name=str(folder)))[2].max_passage_tokens == 64


def test_four_bits_a_weight_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    folder = write_family(tmp_path, "bert")
    message = r'model\.quantize="nf4" needs bitsandbytes, which is not installed; run: pip install'
    refused(message, name=str(folder), lora_rank=2, quantize="nf4")
