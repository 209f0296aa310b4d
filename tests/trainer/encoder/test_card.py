"""What comes out loads everywhere without a word, with a card that the hub reads."""

import ast
import json
import logging
import re
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tests.trainer.encoder.families import CONFIGS, write_family
from tests.trainer.encoder.folders import load
from trainer.encoder.model import save_encoder

ORIGIN = {
    "base": "intfloat/e5-small-v2",
    "data": "arguana",
    "objective": "infonce",
    "negatives": "v3",
    "metrics": {"test, after training": {"ndcg@10": 0.51234, "step": 40}},
}


@pytest.fixture
def loud(caplog):
    """Let transformers say all that it has to say, to where tests hear it."""
    before = transformers_logging.get_verbosity()
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers_logging.disable_propagation()
    transformers_logging.set_verbosity(before)


def save(folder, encoder, tokenizer, traits, origin=None):
    folder.mkdir()
    save_encoder(folder, encoder, tokenizer, traits, origin=origin)
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_misses_and_makes_up_nothing(tmp_path, family, loud):
    loaded = load(write_family(tmp_path / "model", family), projection=9)
    saved = save(tmp_path / "saved", *loaded)
    transformers_logging.set_verbosity_warning()
    model, found = AutoModel.from_pretrained(saved, output_loading_info=True)
    assert not any(found.values()) and not loud.records
    pooler = getattr(model, "pooler", None)
    assert pooler is None or not any(parameter.any() for parameter in pooler.parameters())
    mine = loaded[0].model.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in model.state_dict().items() if "pooler" not in name)
    assert load(saved)[0].model.state_dict().keys() == mine.keys()


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen3"])
def test_a_saved_folder_is_read_without_a_word(tmp_path, family, loud, capfd):
    saved = save(tmp_path / "saved", *load(write_family(tmp_path / "model", family), query_prefix="read "))
    transformers_logging.set_verbosity_warning()
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as said:
        AutoModel.from_pretrained(saved)
        AutoTokenizer.from_pretrained(saved)
        model = SentenceTransformer(str(saved), device="cpu")
        model.encode_query(["a"])
        SentenceTransformerEncoderWrapper(model)
    assert not loud.records and capfd.readouterr() == ("", "")
    assert [w for w in said if "mteb" not in w.filename] == []


def test_others_folders_are_loaded_without_a_word(tmp_path, loud, capfd):
    folder = write_family(tmp_path / "model", "bert")
    transformers_logging.set_verbosity_warning()
    capfd.readouterr()
    load(folder)
    assert not loud.records and capfd.readouterr() == ("", "")


def test_the_card_says_what_is_known_and_nothing_of_the_machine(tmp_path):
    loaded = load(write_family(tmp_path / "model", "bert"), query_prefix="read ", max_query_tokens=9)
    card = ModelCard.load(save(tmp_path / "saved", *loaded, origin=ORIGIN) / "README.md")
    head = card.data.to_dict()
    assert head["library_name"] == "sentence-transformers" and head["pipeline_tag"] == "sentence-similarity"
    assert head["base_model"] == ORIGIN["base"] and "negpool" in head["tags"]
    for said in ("| data | arguana |", "| objective | infonce |", "| negatives | v3 |", "| test, after training | 0.5123 | 40 |"):
        assert said in card.content
    for said in ("'read '", "vector of 32 numbers, compared by cosine similarity", "encode_query", "AutoModel", "model.name"):
        assert said in card.content
    local = save(tmp_path / "other", *loaded, origin={"base": str(tmp_path / "model")}) / "README.md"
    assert "base_model" not in ModelCard.load(local).data.to_dict()
    assert str(tmp_path) not in local.read_text() and "| base | model |" in local.read_text()


def test_the_code_of_a_card_is_code_whatever_the_prompt(tmp_path):
    loaded = load(write_family(tmp_path / "model", "bert"), query_prefix='Instruct: "find" {it} |\nQuery: ')
    card = (save(tmp_path / "saved", *loaded) / "README.md").read_text()
    codes = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(codes) == 2 and all(ast.parse(code) for code in codes)
    texts = [node.value for node in ast.walk(ast.parse(codes[1])) if isinstance(node, ast.Constant)]
    assert f"{loaded[2].query_prefix}how do I read a file?" in texts


def test_two_towers_have_one_card(tmp_path):
    saved = save(tmp_path / "saved", *load(write_family(tmp_path / "model", "bert"), towers="two"))
    assert "AutoModel loads one tower at a time" in (saved / "README.md").read_text()
    assert json.loads((saved / "negpool.json").read_text())["include_prompt"]
