"""What "auto" stands for on each kind of device, and who asks for more digits gets them."""

import pytest
import torch

from trainer.encoder.auto import device_in_words, encode_on, takes_bf16
from trainer.encoder.settings import EncodeSettings
from trainer.job import PrecisionSettings
from trainer.precision import precision_on

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
H200, V100 = ("NVIDIA H200", (9, 0)), ("Tesla V100", (7, 0))


@pytest.fixture
def gpu(monkeypatch, request):
    """A GPU of a name and a compute capability, as torch tells of one."""
    name, capability = request.param
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize(
    ("gpu", "given", "numbers"),
    [
        (H200, {}, ("bf16", "fp16")),
        (H200, {"dtype": "fp32"}, ("fp32", "fp32")),
        (H200, {"dtype": "fp16"}, ("fp16", "fp16")),
        (H200, {"stored": "fp32"}, ("bf16", "fp32")),
        (V100, {}, ("fp32", "fp32")),
        (V100, {"dtype": "fp16"}, ("fp16", "fp16")),
    ],
    indirect=["gpu"],
)
def test_a_gpu_encodes_and_keeps_halves_unless_more_is_asked_for_or_it_has_none(gpu, given, numbers):
    found = encode_on(EncodeSettings(device="cuda:0", **given), GPU)
    assert (found.dtype, found.stored, found.device) == (*numbers, "cuda:0")
    assert encode_on(found, CPU) == found, "what is settled stays"


@pytest.mark.parametrize("given", [{}, {"dtype": "bf16"}, {"stored": "fp16"}])
def test_a_cpu_does_as_ever(given):
    found = encode_on(EncodeSettings(**given), CPU)
    assert found.numbers == {"dtype": "fp32", "stored": "fp32"} | given
    assert found.stored_type == ("float16" if "stored" in given else "float32")


@pytest.mark.parametrize(
    ("has_bf16", "given", "encode", "products"),
    [
        (True, {}, "bf16", "bf16"),
        (True, {"encode": "fp32"}, "fp32", "fp32"),
        (True, {"encode": "fp16"}, "fp16", "bf16"),
        (True, {"products": "fp32"}, "bf16", "fp32"),
        (False, {}, "fp32", "fp32"),
        (False, {"encode": "fp16"}, "fp16", "fp32"),
        (False, {"encode": "bf16", "products": "bf16"}, "bf16", "bf16"),
    ],
)
def test_steps_are_in_halves_where_gpus_have_them(has_bf16, given, encode, products):
    assert precision_on(PrecisionSettings(tf32=True, **given), has_bf16) == PrecisionSettings(
        encode=encode, products=products, tf32=True
    )


@pytest.mark.parametrize(
    ("gpu", "has_bf16", "words"),
    [(H200, True, "NVIDIA H200"), (V100, False, "Tesla V100, which has no bfloat16")],
    indirect=["gpu"],
)
def test_what_a_gpu_lacks_is_said(gpu, has_bf16, words):
    assert takes_bf16(GPU) == has_bf16 and device_in_words(GPU) == words
    assert not takes_bf16(CPU) and device_in_words(CPU) == "the CPU"


def test_what_is_not_settled_is_no_number():
    for ask in (lambda: EncodeSettings().numbers, lambda: EncodeSettings(dtype="fp32").stored_type):
        with pytest.raises(AssertionError, match="encode_on"):
            ask()
