"""Merging: the formulas in plain numpy, folders that others load, and one sentence for what does not fit together."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from tests.tiny import write_tiny_encoder
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder
from trainer.errors import InputError
from trainer.handoff.manifest import open_version
from trainer.merge import merge_models

TEXTS = ["sort the list", "read a file line by line"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and three models that training has moved, each mostly in another place."""
    root = tmp_path_factory.mktemp("merge")
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(write_tiny_encoder(root / "start")), query_prefix="q: "))
    save_encoder(root / "base", encoder, tokenizer, traits)
    start = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for index, (name, tensor) in enumerate(encoder.state_dict().items()):
            if "LayerNorm" in name:
                tensor.copy_(start[name])  # not moved by anybody
            elif tensor.is_floating_point():
                reach = 0.1 if index % 3 == number else 0.01
                tensor.copy_(start[name] + reach * torch.randn(tensor.shape, generator=generator))
        save_encoder(root / f"model{number}", encoder, tokenizer, traits)
    return root


def names(folders, count=3):
    return [str(folders / f"model{number}") for number in range(count)]


def tensors(folder):
    return load_file(folder / "model.safetensors")


def plain_merge(folders, weights, how):
    base, models = tensors(folders / "base"), [tensors(folders / f"model{number}") for number in range(len(weights))]
    merged = {}
    for name, start in base.items():
        deltas = [model[name].astype(np.float64) - start for model in models]
        share = np.array(weights) * (1 if how == "mean" else np.array([np.linalg.norm(delta) for delta in deltas]))
        if share.sum() == 0:
            merged[name] = start.astype(np.float64)
        else:
            merged[name] = start + sum(s * delta for s, delta in zip(share, deltas, strict=True)) / share.sum()
    return merged


@pytest.mark.parametrize("how", ["mean", "delta"])
@pytest.mark.parametrize("weights", [None, [2.0, 0.0, 1.0]])
def test_merged_weights_are_the_formulas(folders, tmp_path, how, weights):
    base = str(folders / "base") if how == "delta" else None
    merge_models(tmp_path / "out", names(folders), how, base, weights)
    found, wanted = tensors(tmp_path / "out"), plain_merge(folders, weights or [1.0] * 3, how)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-7, err_msg=name)


def test_delta_keeps_more_of_what_a_model_has_learnt_than_the_mean_does(folders, tmp_path):
    merge_models(tmp_path / "mean", names(folders))
    merge_models(tmp_path / "delta", names(folders), "delta", str(folders / "base"))
    start, mean, delta = (tensors(folder) for folder in (folders / "base", tmp_path / "mean", tmp_path / "delta"))
    moved = [name for name in start if "LayerNorm" not in name]
    kept = [np.linalg.norm(delta[name] - start[name]) / np.linalg.norm(mean[name] - start[name]) for name in moved]
    assert min(kept) > 1.5
    assert all(np.array_equal(delta[name], start[name]) for name in start if name not in moved)


def test_a_model_merged_with_itself_is_itself_bit_by_bit(folders, tmp_path):
    merge_models(tmp_path / "out", names(folders, 1) * 3, weights=[0.3, 1, 0.1])
    found, wanted = tensors(tmp_path / "out"), tensors(folders / "model0")
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_the_folder_loads_everywhere_and_says_what_went_in(folders, tmp_path):
    found = merge_models(tmp_path / "out", names(folders, 2), weights=[3, 1])
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(tmp_path / "out")))
    assert traits.query_prefix == "q: "
    with torch.inference_mode():
        wanted = encoder.eval()(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    with_st = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(with_st, wanted, rtol=1e-4, atol=1e-5)
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS, padding=True, return_tensors="pt")
    assert AutoModel.from_pretrained(tmp_path / "out")(**inputs).last_hidden_state.shape[-1] == 32
    manifest = open_version(tmp_path / "out")
    assert manifest["merged"]["models"] == names(folders, 2) and manifest["merged"]["weights"] == [3, 1]
    assert manifest["weights_digest"] == found["weights_digest"] not in manifest["merged"]["digests"]


def changed(folders, root, change):
    """Return a copy of a model folder after `change`."""
    copy = root / "changed"
    shutil.copytree(folders / "model1", copy)
    change(copy)
    return str(copy)


def set_json(file, **values):
    return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


def to_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def add_word(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["[UNK]"], tokenizer["model"]["vocab"]["sort"] = (
        tokenizer["model"]["vocab"]["sort"],
        tokenizer["model"]["vocab"]["[UNK]"],
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (set_json("config.json", num_attention_heads=4), "are of two architectures: num_attention_heads is 2 and 4"),
        (set_json("negpool.json", pooling="cls"), "are used differently: pooling is 'mean' and 'cls'"),
        (set_json("negpool.json", query_prefix=""), "are used differently: query_prefix is 'q: ' and ''"),
        (add_word, "have different vocabularies"),
        (to_pickle, "holds no safetensors, and nothing else is read"),
    ],
)
def test_models_that_do_not_fit_together_are_refused_by_what_differs(folders, tmp_path, change, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        merge_models(tmp_path / "out", [str(folders / "model0"), changed(folders, tmp_path, change)])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_base_of_another_shape_is_refused(folders, tmp_path):
    def shorten(folder):
        found = tensors(folder)
        name = "embeddings.position_embeddings.weight"
        save_file(found | {name: found[name][:16]}, folder / "model.safetensors", metadata={"format": "pt"})
        set_json("config.json", max_position_embeddings=16)(folder)
        set_json("negpool.json", max_query_tokens=16, max_passage_tokens=16)(folder)

    with pytest.raises(InputError, match=r"position_embeddings\.weight is \[16, 32\] and \[32, 32\]"):
        merge_models(tmp_path / "out", names(folders), "delta", changed(folders, tmp_path, shorten))


@pytest.mark.parametrize(
    "count, options, sentence",
    [
        (1, {}, "takes two models or more, found 1"),
        (2, {"how": "delta"}, "--how delta needs --base"),
        (2, {"base": "model0"}, "--how mean has no use for it"),
        (2, {"weights": [1.0]}, r"1 weights \[1\.0\] for 2 models"),
        (2, {"weights": [0.0, 0.0]}, "not all 0"),
        (2, {"weights": [2.0, -1.0]}, "of 0 or more"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_sentence(folders, tmp_path, count, options, sentence):
    with pytest.raises(InputError, match=sentence):
        merge_models(tmp_path / "out", names(folders, count), **options)


def test_a_folder_that_exists_is_left_alone(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="exists already"):
        merge_models(tmp_path / "out", names(folders))
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"


def test_a_name_that_is_no_folder_says_how_to_get_one(tmp_path):
    with pytest.raises(InputError, match="some/model is no model folder here; download it first"):
        merge_models(tmp_path / "out", ["some/model", "some/model"])


def test_models_whose_layers_compute_otherwise_are_not_merged(tmp_path):
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=str(write_tiny_encoder(tmp_path / "start")), projection=8))
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        save_encoder(tmp_path / name, encoder, tokenizer, traits)
        dense = tmp_path / name / "2_Dense" / "config.json"
        dense.write_text(
            dense.read_text().replace("linear.Identity", "activation.Tanh" if name == "other" else "linear.Identity")
        )
    with pytest.raises(InputError, match=r"have other layers behind their pooling: .*Identity.* and .*Tanh"):
        merge_models(tmp_path / "out", [str(tmp_path / "one"), str(tmp_path / "other")])
