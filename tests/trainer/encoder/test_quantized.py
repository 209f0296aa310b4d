"""QLoRA: adapters learn beside 4-bit weights, and what is saved is a float32 model with the same embeddings."""

import pytest
import torch

from tests.trainer.encoder.families import TEXTS, write_family
from trainer.encoder.model import ModelSettings, load_encoder, save_encoder, weights_digest

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "query")])
@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_adapters_beside_four_bit_weights_learn_and_are_saved_merged(tmp_path, family, targets):
    folder = write_family(tmp_path / "model", family)
    settings = {"name": str(folder), "lora_rank": 4, "quantize": "nf4", "dropout": 0.0, "lora_targets": targets}
    encoder, tokenizer, traits = load_encoder(ModelSettings(**settings))
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in encoder.modules())
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    (encoder(inputs) * torch.randn(len(TEXTS), 32)).sum().backward()
    trained = [p for p in encoder.parameters() if p.requires_grad]
    assert trained and all(float(p.grad.abs().max()) > 0 for p in trained)
    (tmp_path / "saved").mkdir()
    save_encoder(tmp_path / "saved", encoder, tokenizer, traits)
    again, *_ = load_encoder(ModelSettings(name=str(tmp_path / "saved")))
    assert {p.dtype for p in again.parameters()} == {torch.float32} and weights_digest(again) == weights_digest(encoder)
    with torch.inference_mode():
        torch.testing.assert_close(again.eval()(inputs), encoder.eval()(inputs), rtol=0, atol=1e-5)


def test_evaluation_multiplies_as_training_does_on_a_cpu_with_bfloat16_too(tmp_path, monkeypatch):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    folder = write_family(tmp_path / "model", "bert")
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=str(folder), lora_rank=4, quantize="nf4", dropout=0.0))
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(encoder.train()(inputs), encoder.eval()(inputs))
        is_token, longest = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
        starts = torch.nn.functional.pad(is_token.sum(1).cumsum(0), (1, 0)).int()
        packed = encoder({"input_ids": inputs["input_ids"][is_token], "starts": starts, "longest": longest})
        torch.testing.assert_close(packed, encoder(inputs), rtol=0, atol=1e-5)
