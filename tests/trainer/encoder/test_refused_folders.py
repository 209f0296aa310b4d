"""What cannot be read right is refused by its name, in one sentence, and nothing of a folder is ever run."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SparseEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    LSTM,
    Dense,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
    WeightedLayerPooling,
)
from sentence_transformers.sparse_encoder.modules import SpladePooling

from tests.tiny import write_tiny_cross_encoder
from tests.trainer.encoder.folders import WIDTH, assert_means_the_same, build, edit, load
from trainer.encoder.model import ModelSettings, check_model, load_encoder, load_text_rules
from trainer.errors import InputError

VECTOR = "negpool trains a transformer that gives one vector a text; set model.name"


def refused(folder, message, **settings):
    """All ways to open a model refuse a folder with the same sentence."""
    for open_model in (load_encoder, load_text_rules):
        with pytest.raises(InputError, match=message) as error:
            open_model(ModelSettings(name=str(folder), **settings))
        assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def plain(tmp_path, transformer):
    """Return the folder of a transformer with mean pooling, as sentence-transformers saves it."""
    return build(tmp_path / "plain", Transformer(str(transformer())), Pooling(WIDTH))


@pytest.mark.parametrize(
    "kind, modules",
    [
        ("CNN", [CNN(WIDTH, 8, [1]), Pooling(8)]),
        ("LSTM", [LSTM(WIDTH, 8), Pooling(16)]),
        ("WeightedLayerPooling", [WeightedLayerPooling(WIDTH, 2, layer_start=1), Pooling(WIDTH)]),
        ("SpladePooling", [SpladePooling()]),
    ],
)
def test_modules_that_we_do_not_have_are_named(tmp_path, transformer, kind, modules):
    build(tmp_path / "theirs", Transformer(str(transformer())), *modules)
    said = refused(tmp_path / "theirs", f"has the module {kind}: it .*{VECTOR}")
    with pytest.raises(InputError) as error:
        check_model(str(tmp_path / "theirs"))
    assert str(error.value) == said


def test_static_embeddings_are_refused_by_name(tmp_path, transformer):
    tokenizer = Transformer(str(transformer())).tokenizer.backend_tokenizer
    build(tmp_path / "static", StaticEmbedding(tokenizer, embedding_dim=8))
    refused(tmp_path / "static", f"has the module StaticEmbedding: it looks vectors of words up.*{VECTOR}")
    (tmp_path / "model2vec").mkdir()
    edit(tmp_path / "model2vec" / "config.json", model_type="model2vec", architectures=["StaticModel"])
    refused(tmp_path / "model2vec", f"is a model2vec model: it looks vectors of words up.*{VECTOR}")


@pytest.mark.parametrize(
    "edits, message",
    [
        ({"model_type": "SparseEncoder"}, "is a SparseEncoder: it gives sparse vectors"),
        ({"model_type": "CrossEncoder"}, "is a CrossEncoder: it scores pairs of texts"),
        ({"model_type": "MultiVectorEncoder"}, "is a MultiVectorEncoder: it gives a vector for every token, as ColBERT does"),
        ({"model_type": "Another"}, "is a Another, which negpool does not know"),
        ({"skiplist_words": ["a"]}, r"has skiplist_words=\['a'\], which negpool does not know, and it may change the embedding"),
        ({"similarity_fn_name": "euclidean"}, "compares embeddings by euclidean distance, and negpool by products"),
        ({"default_prompt_name": "x", "prompts": {}}, "has default_prompt_name='x', expected one of its prompts"),
        ({"prompts": ["x"]}, r"has prompts=\['x'\], expected an object of prompts"),
        ({"truncate_dim": "8"}, "says width='8', expected a whole number"),
        ({"truncate_dim": -1}, "records a width of -1, expected 1 or more; set model.width"),
    ],
)
def test_what_the_model_says_and_we_do_not_know_is_refused(plain, edits, message):
    edit(plain / "config_sentence_transformers.json", **edits)
    refused(plain, message)


@pytest.mark.parametrize(
    "edits, message",
    [
        ({"transformer_task": "fill-mask"}, "has transformer_task='fill-mask'"),
        ({"module_output_name": "sentence_embedding"}, "has module_output_name='sentence_embedding'"),
        ({"modality_config": {"text": {"method": "forward", "method_output_name": ["hidden_states", -2]}}}, "hidden_states"),
        ({"modality_config": {"message": {"method": "forward"}, "text": {}}}, "without a chat template"),
        ({"query_expansion": {"length": 32}}, "has query_expansion: it gives a vector for every token"),
        ({"processing_kwargs": {"text": {"max_length": 4}}}, "has processing_kwargs=.*which negpool does not know"),
        (
            {"model_args": {"rotary_scaling_factor": 2}},
            "gives its model the argument rotary_scaling_factor=2, which negpool does not",
        ),
        ({"tokenizer_args": 3}, "has processor_kwargs=3, expected an object"),
        ({"tokenizer_name_or_path": "x"}, "has tokenizer_name_or_path='x', which negpool does not know"),
    ],
)
def test_what_the_transformer_module_says_and_we_cannot_do_is_refused(plain, edits, message):
    edit(plain / "sentence_bert_config.json", **edits)
    refused(plain, message)


@pytest.mark.parametrize(
    "edits, message",
    [
        ({"activation_function": "transformers.activations.NewGELUActivation"}, "expected one of torch.nn.modules.activation"),
        ({"activation_function": "torch.nn.modules.activation.system"}, "expected one of torch.nn.modules.activation"),
        ({"module_input_name": "token_embeddings"}, "is a Dense layer with module_input_name='token_embeddings', expected"),
        ({"scale": 2.0}, "has scale=2.0, which negpool does not know, and it may change the embedding"),
        ({"in_features": 64}, "size mismatch"),
    ],
)
def test_what_a_layer_says_and_we_cannot_do_is_refused(tmp_path, transformer, edits, message):
    folder = build(tmp_path / "theirs", Transformer(str(transformer())), Pooling(WIDTH), Dense(WIDTH, 12))
    edit(folder / "2_Dense" / "config.json", **edits)
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_layer_that_is_made_for_another_width_is_one_sentence(tmp_path, transformer):
    folder = build(tmp_path / "theirs", Transformer(str(transformer())), Pooling(WIDTH, ("mean", "cls")), Dense(64, 12))
    with pytest.raises(InputError, match=r"has a Dense for vectors of 64 numbers, and gives it 32; set model\.pooling to"):
        load(folder, pooling="mean")


def test_a_model_of_tokens_is_refused(tmp_path, transformer):
    modules = [Dense(WIDTH, 12, module_input_name="token_embeddings"), Normalize(module_input_name="token_embeddings")]
    folder = build(tmp_path / "colbert", Transformer(str(transformer())), *modules)
    refused(folder, "has Transformer and Dense and Normalize without a pooling: it gives a vector for every token")
    entries = json.loads((folder / "modules.json").read_text())
    entries[1]["type"] = "pylate.models.Dense.Dense"
    (folder / "modules.json").write_text(json.dumps(entries))
    refused(folder, "has the module pylate.models.Dense.Dense: it gives a vector for every token, as ColBERT does")


@pytest.mark.parametrize("kind", [SparseEncoder, CrossEncoder, MultiVectorEncoder])
def test_other_models_of_sentence_transformers_are_refused_as_it_saves_them(tmp_path, transformer, kind):
    kind(str(transformer()), device="cpu").save_pretrained(str(tmp_path / "theirs"))
    refused(tmp_path / "theirs", rf"is a {kind.__name__}: it .*{VECTOR}")


def test_a_cross_encoder_is_refused(tmp_path):
    folder = write_tiny_cross_encoder(tmp_path / "pairs")
    refused(folder, r"is a cross-encoder \(BertForSequenceClassification\): it scores pairs of texts")


def test_routes_of_other_names_and_towers_that_differ_are_refused(tmp_path, transformer):
    def side(pooling="mean", family="bert"):
        return [Transformer(str(transformer(family))), Pooling(WIDTH, pooling)]

    images = build(tmp_path / "images", Router({"query": side(), "image": side()}, default_route="query"))
    refused(images, "has routes for query, image, expected one for query and one for document")
    for name, other, message in (
        ("poolings", side("cls"), "two towers of .* are used differently: pooling is 'mean' and 'cls'; set model.pooling"),
        ("tokenizers", side(family="roberta"), "towers of .* have tokenizers of their own, expected one for both"),
    ):
        folder = build(tmp_path / name, Router.for_query_document(side(), other))
        with pytest.raises(InputError, match=message):
            load(folder)


def test_a_module_of_nobodys_is_never_imported(plain):
    entries = json.loads((plain / "modules.json").read_text())
    entries[1]["type"] = "custom_code.Pooling"
    (plain / "modules.json").write_text(json.dumps(entries))
    (plain / "custom_code.py").write_text(f"open({str(plain / 'ran')!r}, 'w')")
    refused(plain, "has the module custom_code.Pooling, code of its own, which negpool never runs")
    entries[1] |= {"type": "sentence_transformers.models.Pooling", "path": "../elsewhere"}
    (plain / "modules.json").write_text(json.dumps(entries))
    refused(plain, r"has a module at \.\./elsewhere, outside of the folder")
    assert not (plain / "ran").exists()


@pytest.mark.parametrize("model_type", ["bert", "no_such_type"])
def test_code_in_a_folder_is_never_run_and_never_asked_about(tmp_path, transformer, monkeypatch, model_type):
    folder = tmp_path / "remote"
    shutil.copytree(transformer(), folder)
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnConfig: pass\nclass OwnModel: pass\n"
    (folder / "modeling_own.py").write_text(code)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    edit(folder / "config.json", model_type=model_type, auto_map=auto_map)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    refused(folder, r"is computed by code of its own \(modeling_own\.OwnConfig\), which negpool never runs; set model\.name")
    edit(folder / "config.json", model_type="bert", auto_map={"AutoModel": "modeling_own.BertModel"})
    assert load(folder)[2].pooling == "mean"  # transformers has taken the class over
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["modeling_own.OwnTokenizer", None]},
    )
    (folder / "tokenizer.json").unlink()
    refused(folder, "is not a model that can be loaded")
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_missing_are_not_made_up(tmp_path, transformer):
    folder = tmp_path / "half"
    shutil.copytree(transformer(), folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"has no weights for 16 tensors of a BertModel, such as encoder\.layer\.1\..*; set model\.name"
    ):
        load(folder)


class Command:
    """What a pickle may do to whoever reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_of_tensors_are_read_and_others_never_run(tmp_path, transformer):
    modules = [Pooling(WIDTH), Dense(WIDTH, 12)]
    folder = build(tmp_path / "theirs", Transformer(str(transformer())), *modules)
    for place, old in ((folder, "pytorch_model.bin"), (folder / "2_Dense", "pytorch_model.bin")):
        torch.save(load_file(place / "model.safetensors"), place / old)
        (place / "model.safetensors").unlink()
    assert_means_the_same(folder, tmp_path)
    for place in (folder / "2_Dense", folder):
        torch.save({"linear.weight": Command(tmp_path / "ran")}, place / "pytorch_model.bin")
        message = (
            rf"{place}/pytorch_model\.bin holds more than tensors, and reading it could run code.*safetensors\.torch\.save_file"
        )
        with pytest.raises(InputError, match=message) as error:
            load(folder)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
