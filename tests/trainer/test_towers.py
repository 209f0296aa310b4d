"""Frozen towers, LoRA, activation checkpointing: the reference's gradients, and only where there should be some."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradcache import DDPSync, Temperature, cached_step, reference_step
from gradcache.budget import saved_bytes
from tests.gradcache.test_backends import LOSS, SETTINGS
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.gradients import assert_same_gradients, gradients_of
from tests.ranks import run_ranks
from tests.tiny import VOCABULARY, write_tiny_encoder
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.towers import SIDES


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
        loss=LOSS,
        **SETTINGS,
    )
    assert all(p.grad is None for e in encoders for p in e.parameters() if not p.requires_grad)
    return gradients_of(**{f"tower{i}": e for i, e in enumerate(encoders)}, temperature=temperature)


@pytest.mark.parametrize("kind", ["lora", "frozen passages"])
@pytest.mark.parametrize("rows", [(5, 3), (0, 4)])
def test_what_is_trained_gets_the_references_gradient(kind, rows):
    encoders, temperature = build(kind)
    reference_step([make_batch(rank, n, encoders) for rank, n in enumerate(rows)], temperature=temperature, loss=LOSS, **SETTINGS)
    wanted = gradients_of(**{f"tower{i}": e for i, e in enumerate(encoders)}, temperature=temperature)
    assert len(wanted) > 8
    for found in run_ranks(step, len(rows), rows, kind):
        assert_same_gradients(found, wanted)


def two_towers(folder):
    encoder, *_ = load_encoder(ModelSettings(name=str(folder), towers="two", projection=7))
    with torch.no_grad():
        for parameter in encoder.passage.parameters():
            parameter.mul_(1.1)
    return encoder, Temperature(0.1, learnable=True)


def sides_of(encoder):
    def encode(inputs, side):
        known = inputs["input_ids"] % len(VOCABULARY)
        return encoder({**inputs, "input_ids": known}, side=side)

    return [functools.partial(encode, side=side) for side in SIDES]


def step_of_two_towers(rank, rows, folder):
    encoder, temperature = two_towers(folder)
    called = DistributedDataParallel(encoder, broadcast_buffers=False)
    batch = make_batch(rank, rows[rank], sides_of(called))
    sync = DDPSync(called)
    cached_step(batch, temperature=temperature, sync=sync, group=dist.group.WORLD, keep_graphs=2, loss=LOSS, **SETTINGS)
    return gradients_of(encoder=encoder, temperature=temperature)


@pytest.mark.parametrize("rows", [(5, 3), (0, 4)])
def test_two_towers_in_one_wrapper_get_the_references_gradient(tmp_path, rows):
    folder = write_tiny_encoder(tmp_path / "model")
    encoder, temperature = two_towers(folder)
    batches = [make_batch(rank, n, sides_of(encoder)) for rank, n in enumerate(rows)]
    reference_step(batches, temperature=temperature, loss=LOSS, **SETTINGS)
    wanted = gradients_of(encoder=encoder, temperature=temperature)
    assert {name.split(".")[1] for name in wanted if name.startswith("encoder")} == {"query", "passage"}
    for found in run_ranks(step_of_two_towers, len(rows), rows, folder):
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
