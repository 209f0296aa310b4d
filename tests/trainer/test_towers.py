"""Frozen towers, LoRA, activation checkpointing: the reference's gradients, and only where there should be some."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, Temperature, cached_step, reference_step
from gradcache.budget import saved_bytes
from tests.gradcache.test_backends import SETTINGS
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.gradients import assert_same_gradients, gradients_of
from tests.ranks import run_ranks
from tests.tiny import write_tiny_encoder
from trainer.encoder.model import ModelSettings, load_encoder


def with_lora(encoder):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules=["query", "value"])
    encoder.bert = peft.get_peft_model(encoder.bert, config)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # zeros would hide every gradient of lora_A
    return encoder


def frozen(encoder):
    return encoder.requires_grad_(False)


def build(kind):
    torch.manual_seed(4)
    encoders = [TinyEncoder(seed, 0.2).train() for seed in range(1 if kind == "lora" else 2)]
    if kind == "lora":
        encoders = [with_lora(encoders[0])]
    if kind == "frozen passages":
        frozen(encoders[1])
    return encoders, Temperature(0.1, learnable=True)


def step(rank, rows, kind):
    encoders, temperature = build(kind)
    trained = [any(p.requires_grad for p in encoder.parameters()) for encoder in encoders]
    called = [DistributedDataParallel(e, broadcast_buffers=False) if t else e for e, t in zip(encoders, trained, strict=True)]
    cached_step(
        make_batch(rank, rows[rank], called),
        temperature=temperature,
        sync=DDPSync(*(c for c, t in zip(called, trained, strict=True) if t)),
        group=dist.group.WORLD,
        keep_graphs=2,
        **SETTINGS,
    )
    assert all(p.grad is None for e in encoders for p in e.parameters() if not p.requires_grad)
    return gradients_of(**{f"tower{i}": e for i, e in enumerate(encoders)}, temperature=temperature)


@pytest.mark.parametrize("kind", ["lora", "frozen passages"])
@pytest.mark.parametrize("rows", [(5, 3), (0, 4)])
def test_what_is_trained_gets_the_references_gradient(kind, rows):
    encoders, temperature = build(kind)
    reference_step([make_batch(rank, n, encoders) for rank, n in enumerate(rows)], temperature=temperature, **SETTINGS)
    wanted = gradients_of(**{f"tower{i}": e for i, e in enumerate(encoders)}, temperature=temperature)
    assert len(wanted) > 8
    for found in run_ranks(step, len(rows), rows, kind):
        assert_same_gradients(found, wanted)


def test_activation_checkpointing_is_off_for_kept_chunks_and_changes_no_gradient(tmp_path):
    folder = str(write_tiny_encoder(tmp_path / "model"))
    inputs = {"input_ids": torch.randint(5, 20, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    found, saved = [], []
    for settings, keep in [(False, False), (True, False), (True, True)]:
        encoder, *_ = load_encoder(ModelSettings(name=folder, checkpoint_activations=settings))
        outputs = []
        torch.manual_seed(1)
        saved.append(saved_bytes(lambda e=encoder, k=keep, o=outputs: o.append(e(inputs, keep_activations=k))))
        outputs[0][:, 0].sum().backward()
        found.append(gradients_of(encoder=encoder))
        assert encoder.model.is_activation_checkpointing == settings
    assert saved[1] < 0.6 * saved[0] and saved[2] == saved[0]
    assert_same_gradients(found[1], found[0])
    assert_same_gradients(found[2], found[0])
