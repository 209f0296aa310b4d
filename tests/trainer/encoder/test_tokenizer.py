"""The tokenizer of a model: its end token survives saving, it pads, and another model's is refused in a sentence."""

import shutil

import pytest
from transformers import AutoTokenizer

from tests.trainer.encoder.families import CONFIGS, DECODERS, TEXTS, write_family, write_tokenizer
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder
from trainer.errors import InputError


def load(folder, **settings):
    return load_encoder(ModelSettings(name=str(folder), **settings))


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_ends_its_texts_and_so_does_its_saved_tokenizer(tmp_path, family):
    folder = write_family(tmp_path / "model", family)
    plain = load(folder, pooling="mean")[1](TEXTS)["input_ids"]
    encoder, tokenizer, traits = load(folder)
    assert traits.pooling == "last"
    (tmp_path / "saved").mkdir()
    save_encoder(tmp_path / "saved", encoder, tokenizer, traits)
    for used in (tokenizer, load(tmp_path / "saved")[1], AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert used(TEXTS)["input_ids"] == [[*ids, used.eos_token_id] for ids in plain]
        cut = used(TEXTS, truncation=True, max_length=5)["input_ids"]
        assert cut == [[*ids[:4], used.eos_token_id] for ids in plain]


def test_the_job_says_whether_texts_are_ended(tmp_path):
    folder = write_family(tmp_path, "mistral")
    for pooling, append_eos, expected in [("last", False, False), ("mean", True, True), ("mean", None, False)]:
        ids = load(folder, pooling=pooling, append_eos=append_eos)[1]("sort")["input_ids"]
        assert (ids[-1] == 2) == expected
    with pytest.raises(InputError, match=r"model\.append_eos=true needs a tokenizer with an end token"):
        load(write_family(tmp_path / "bert", "bert"), append_eos=True)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tokenizer_pads(tmp_path, family):
    tokenizer = load(write_family(tmp_path, family))[1]
    padded = tokenizer(TEXTS, padding=True)
    assert tokenizer.pad_token is not None and len({len(ids) for ids in padded["input_ids"]}) == 1
    assert 0 in padded["attention_mask"][0]


@pytest.mark.parametrize(("owner", "other"), [("qwen2", "bert"), ("bert", "qwen2")])
def test_another_models_tokenizer_is_refused_in_one_sentence(tmp_path, owner, other):
    write_family(tmp_path / "model", owner)
    write_tokenizer(tmp_path / "other", other)
    for file in (tmp_path / "other").iterdir():
        shutil.copy(file, tmp_path / "model")
    with pytest.raises(InputError, match=r"makes token ids up to \d+.* embeddings for \d+.*set model\.name") as error:
        load(tmp_path / "model")
    assert "\n" not in str(error.value)
