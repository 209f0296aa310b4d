"""Adapters: they alone are trained, their gradients are the formula's, and saving merges them beside the live model."""

import pytest
import torch

from tests.trainer.encoder.families import CONFIGS, TEXTS, write_family
from trainer.encoder.dropout import Dropout
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder, weights_digest
from trainer.errors import InputError

RANK = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("lora"), "qwen3")


def load(folder, **settings):
    return load_encoder(ModelSettings(name=str(folder), **settings))


def batch(tokenizer):
    return dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


def moved(encoder):
    """Give the adapters' second halves, zero at first, some value."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return encoder


def embed(encoder, tokenizer):
    with torch.inference_mode():
        return encoder.eval()(batch(tokenizer))


@pytest.mark.parametrize("family", CONFIGS)
def test_only_adapters_and_new_layers_are_trained_and_each_gets_a_gradient(tmp_path, family):
    encoder, tokenizer, _ = load(write_family(tmp_path, family), lora_rank=RANK, projection=7)
    (moved(encoder)(batch(tokenizer)) * torch.randn(len(TEXTS), 7)).sum().backward()
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith("dense.") for name in trained) and len(trained) > 12
    assert all(float(p.grad.abs().max()) > 0 for p in trained.values())
    assert all(p.grad is None for p in encoder.parameters() if not p.requires_grad)


def test_new_adapters_change_nothing_and_are_the_same_at_every_start(folder):
    plain, tokenizer, _ = load(folder)
    first, *_ = load(folder, lora_rank=RANK)
    torch.manual_seed(9)
    second, *_ = load(folder, lora_rank=RANK)
    assert torch.equal(embed(first, tokenizer), embed(plain, tokenizer))
    assert weights_digest(first) == weights_digest(plain)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_an_adapter_is_its_formula(folder, alpha):
    encoder, *_ = load(folder, lora_rank=RANK, lora_alpha=alpha, lora_targets=("up_proj",))
    layer = moved(encoder).eval().model.layers[0].mlp.up_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    values = torch.randn(5, 32)
    scale = 2.0 if alpha is None else alpha / RANK
    wanted = values @ (layer.base_layer.weight + scale * up @ down).T
    torch.testing.assert_close(layer(values), wanted)
    (gradient,) = torch.autograd.grad(layer(values).sum(), up)
    torch.testing.assert_close(gradient, scale * (values @ down.T).sum(0).expand(len(up), -1))


def test_the_job_says_which_layers_are_adapted(folder):
    def adapted(targets):
        encoder, *_ = load(folder, lora_rank=RANK, lora_targets=targets)
        return {name.split(".")[-4] for name, p in encoder.named_parameters() if p.requires_grad}

    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert adapted("all-linear") == attention | {"gate_proj", "up_proj", "down_proj"}
    assert adapted(("q_proj", "v_proj")) == {"q_proj", "v_proj"} and adapted("o_proj") == {"o_proj"}
    with pytest.raises(InputError, match=r"model\.lora_targets='query' names no layer .* linear layers are .*q_proj.*all-linear"):
        load(folder, lora_rank=RANK, lora_targets="query")


def test_dropout_before_the_adapters_is_replayed_by_seed(folder):
    encoder, tokenizer, _ = load(folder, lora_rank=RANK, lora_dropout=0.3, dropout=0.0)
    assert all(type(m) is Dropout for m in moved(encoder).modules() if isinstance(m, torch.nn.Dropout))
    inputs = batch(tokenizer)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(encoder(inputs).detach())
    assert torch.equal(draws[0], draws[1]) and not torch.allclose(draws[0], draws[2], atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_saving_merges_and_leaves_the_live_model_as_it_is(tmp_path, family):
    folder = write_family(tmp_path / "model", family)
    encoder, tokenizer, traits = load(folder, lora_rank=RANK)
    before = {name: tensor.clone() for name, tensor in moved(encoder).state_dict().items()}
    (tmp_path / "saved").mkdir()
    save_encoder(tmp_path / "saved", encoder, tokenizer, traits)
    after = encoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again, *_ = load(tmp_path / "saved")
    assert again.state_dict().keys() == load(folder)[0].state_dict().keys()
    assert weights_digest(again) == weights_digest(encoder) != weights_digest(load(folder)[0])
    torch.testing.assert_close(embed(again, tokenizer), embed(encoder, tokenizer), rtol=0, atol=1e-5)
    assert not torch.allclose(embed(again, tokenizer), embed(load(folder)[0], tokenizer), atol=1e-2)


def test_whole_weights_from_elsewhere_are_saved_in_the_place_of_the_models_own(folder, tmp_path):
    encoder, tokenizer, traits = load(folder, lora_rank=RANK)
    whole = {name: tensor.clone() for name, tensor in moved(encoder).state_dict().items()}
    wanted, digest = embed(encoder, tokenizer), weights_digest(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    save_encoder(tmp_path, encoder, tokenizer, traits, whole)
    assert weights_digest(encoder, whole) == digest == weights_digest(load(tmp_path)[0])
    torch.testing.assert_close(embed(load(tmp_path)[0], tokenizer), wanted, rtol=0, atol=1e-5)
