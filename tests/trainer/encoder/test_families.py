"""Every family: padding and neighbours change nothing, every trained parameter learns, dropout replays, saving is exact."""

import pytest
import torch
from transformers.utils import logging as transformers_logging

from gradcache import NoSync, Temperature, cached_step, reference_step
from gradcache.budget import saved_bytes
from tests.gradcache.test_backends import LOSS, SETTINGS
from tests.gradcache.test_step import make_batch
from tests.gradients import assert_same_gradients, gradients_of
from tests.trainer.encoder.families import CONFIGS, DECODERS, TEXTS, write_family
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder, weights_digest

transformers_logging.disable_progress_bar()


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family") / request.param, request.param)


def load(folder, **settings):
    return load_encoder(ModelSettings(name=str(folder), **settings))


def batch(tokenizer, side="right", texts=TEXTS):
    return dict(tokenizer(texts, padding=True, padding_side=side, return_tensors="pt"))


def embed(encoder, inputs):
    with torch.inference_mode():
        return encoder.eval()(inputs)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_depends_on_its_text_alone(folder, pooling):
    encoder, tokenizer, _ = load(folder, pooling=pooling)
    alone = torch.cat([embed(encoder, batch(tokenizer, texts=[text])) for text in TEXTS])
    assert float(torch.pdist(alone).min()) > 0.05, "texts differ"
    for side in ("right", "left"):
        torch.testing.assert_close(embed(encoder, batch(tokenizer, side)), alone, rtol=0, atol=2e-6)
    zeros = batch(tokenizer)
    zeros["input_ids"] *= zeros["attention_mask"]  # what the trainer pads with
    torch.testing.assert_close(embed(encoder, zeros), alone, rtol=0, atol=2e-6)


def test_a_step_gives_every_parameter_a_gradient(folder):
    encoder, tokenizer, _ = load(folder)
    weight = torch.randn(len(TEXTS), encoder.width, generator=torch.Generator().manual_seed(0))
    (encoder(batch(tokenizer)) * weight).sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert without == []


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2, "lora_dropout": 0.1}, {"pooling": "latent", "latents": 4}])
def test_a_cached_step_gives_the_references_gradient(folder, settings):
    found = []
    for kept in (0, 2, None):
        encoder, tokenizer, _ = load(folder, **settings)
        moved = [p for name, p in encoder.named_parameters() if "lora_B" in name]
        torch.manual_seed(5)
        for parameter in moved:
            torch.nn.init.normal_(parameter, std=0.2)  # zeros would hide every gradient of lora_A
        count, temperature = len(tokenizer), Temperature(0.1, learnable=True)
        batch = make_batch(0, 6, [lambda inputs, e=encoder, n=count: e({**inputs, "input_ids": inputs["input_ids"] % n})])
        if kept is None:
            reference_step([batch], temperature=temperature, loss=LOSS, **SETTINGS)
        else:
            cached_step(batch, temperature=temperature, sync=NoSync(), group=None, keep_graphs=kept, loss=LOSS, **SETTINGS)
        found.append(gradients_of(encoder=encoder, temperature=temperature))
    assert_same_gradients(found[0], found[2])
    assert_same_gradients(found[1], found[2])


def test_dropout_is_drawn_by_seed_with_and_without_graph(folder):
    encoder, tokenizer, _ = load(folder)
    inputs = batch(tokenizer)

    def draw(seed, grad=True):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(grad):
            return encoder(inputs).detach()

    assert torch.equal(draw(1), draw(1)) and torch.equal(draw(1), draw(1, grad=False))
    assert not torch.allclose(draw(1), draw(2), atol=1e-3)
    still, _, _ = load(folder, dropout=0.0)
    torch.testing.assert_close(still(inputs).detach(), embed(still, inputs))


def test_what_is_saved_loads_bit_for_bit(folder, tmp_path):
    encoder, tokenizer, traits = load(folder)
    save_encoder(tmp_path, encoder, tokenizer, traits)
    again, tokenizer_again, traits_again = load(tmp_path)
    assert traits_again == traits and weights_digest(again) == weights_digest(encoder)
    assert batch(tokenizer_again)["input_ids"].equal(batch(tokenizer)["input_ids"])
    assert torch.equal(embed(again, batch(tokenizer)), embed(encoder, batch(tokenizer)))


@pytest.mark.parametrize("family", DECODERS)
def test_activation_checkpointing_of_a_decoder_saves_memory_and_changes_no_gradient(tmp_path, family):
    folder = write_family(tmp_path, family)
    found, saved = [], []
    for is_on, keep in [(False, False), (True, False), (True, True)]:
        encoder, tokenizer, _ = load(folder, checkpoint_activations=is_on)
        outputs = []
        torch.manual_seed(1)
        inputs = batch(tokenizer)
        saved.append(saved_bytes(lambda e=encoder, k=keep, o=outputs, i=inputs: o.append(e(i, keep_activations=k))))
        outputs[0][:, 0].sum().backward()
        found.append(gradients_of(encoder=encoder))
    assert saved[1] < 0.6 * saved[0] and saved[2] == saved[0]
    assert_same_gradients(found[1], found[0])
    assert_same_gradients(found[2], found[0])
