"""Compiled layers: the gradients of plain ones, dropout replayed between both encodings, and a fallback that is said."""

import logging

import pytest
import torch

from tests.gradients import assert_same_gradients, gradients_of
from tests.trainer.encoder.families import TEXTS, write_family
from trainer.encoder import compiled as compiled_module
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder, weights_digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("compiled"), "qwen3")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Trace and differentiate as ever, but for one shape and without generating C++, which would take minutes."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_module, "HOW", {"backend": "aot_eager", "dynamic": False})


def load(folder, **settings):
    return load_encoder(ModelSettings(name=str(folder), pooling="mean", **settings))


def batch(tokenizer):
    return dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


def step(encoder, inputs):
    torch.manual_seed(1)
    embedding = encoder(inputs)
    weight = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    (embedding * weight).sum().backward()
    return embedding.detach()


def test_compiled_gradients_are_the_plain_ones(folder, caplog):
    plain, tokenizer, _ = load(folder, dropout=0.0)
    compiled, *_ = load(folder, dropout=0.0, compile=True)
    with caplog.at_level(logging.WARNING):
        inputs = batch(tokenizer)
        with torch.inference_mode():  # as evaluation does, before the first step
            torch.testing.assert_close(compiled.eval()(inputs), plain.eval()(inputs), rtol=0, atol=1e-5)
        compiled.train()
        plain.train()
        torch.testing.assert_close(step(compiled, inputs), step(plain, inputs), rtol=0, atol=1e-5)
    assert_same_gradients(gradients_of(encoder=compiled), gradients_of(encoder=plain))
    assert not [record for record in caplog.records if record.name == compiled_module.__name__]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert weights_digest(compiled) == weights_digest(plain)


def test_a_seed_replays_compiled_dropout_with_and_without_graph(folder):
    encoder, tokenizer, _ = load(folder, compile=True)
    inputs = batch(tokenizer)
    with_graph = step(encoder, inputs)
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(encoder(inputs), with_graph)
        assert not torch.allclose(encoder(inputs), with_graph, atol=1e-3)


def test_what_cannot_be_compiled_is_said_once_and_goes_on_without(monkeypatch, caplog, tmp_path):
    def fail(graph, inputs):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(compiled_module, "HOW", {"backend": fail})
    folder = write_family(tmp_path / "model", "bert")  # draws before its first layer
    plain, tokenizer, traits = load(folder)
    encoder, *_ = load(folder, compile=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(step(encoder, batch(tokenizer)), step(plain, batch(tokenizer)))
    said = [record.message for record in caplog.records if record.name == compiled_module.__name__]
    assert len(said) == 1 and said[0].startswith("model.compile=true does not work here (") and "no compiler" in said[0]
    assert "\n" not in said[0]
    assert_same_gradients(gradients_of(encoder=encoder), gradients_of(encoder=plain))
    (tmp_path / "saved").mkdir()
    save_encoder(tmp_path / "saved", encoder, tokenizer, traits)
    assert weights_digest(load(tmp_path / "saved")[0]) == weights_digest(plain)
