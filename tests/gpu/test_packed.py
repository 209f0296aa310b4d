"""Packed texts on a GPU: the flash kernel against the plain reference, replayed dropout, and a step without a wait."""

import pytest
import torch

from tests.trainer.encoder.test_packed import LENGTHS, build, inputs_of
from trainer.encoder import attention as attention_module
from trainer.encoder.attention import packed_attention
from trainer.encoder.packed import packs

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def rows_of_heads(lengths=LENGTHS, num_key_heads=2, width=32, dtype=torch.bfloat16):
    """Return random query, key and value of packed rows, and their starts."""
    torch.manual_seed(0)
    heads = [torch.randn(1, h, sum(lengths), width, device="cuda", dtype=dtype) for h in (4, num_key_heads, num_key_heads)]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    return [head.requires_grad_() for head in heads], starts


def attend(heads, rows, dropout=0.0):
    """Return packed attention and the gradients of a fixed weighting of it, all in float32."""
    module = torch.nn.Module()
    module.num_key_value_groups = heads[0].shape[1] // heads[1].shape[1]
    states = packed_attention(module, *heads, rows, dropout, None)
    weight = torch.randn(states.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    gradients = torch.autograd.grad((states.float() * weight).sum(), heads)
    return [states.detach().float(), *(gradient.float() for gradient in gradients)]


def cosine(first, second):
    return float(torch.nn.functional.cosine_similarity(first.flatten().double(), second.flatten().double(), dim=0))


@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize("num_key_heads", [4, 2])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 5), (True, 5)])
def test_the_flash_kernel_is_the_reference(causal, window, num_key_heads, width):
    heads, starts = rows_of_heads(num_key_heads=num_key_heads, width=width)
    rows = (starts, max(LENGTHS), causal, window)
    exact = [head.detach().float().requires_grad_() for head in heads]
    for found, expected in zip(attend(heads, rows), attend(exact, rows), strict=True):
        assert float(expected.norm()) > 1
        assert cosine(found, expected) > 0.9999, "bfloat16 has 8 bits"
        assert float((found - expected).abs().max()) < 0.03 * float(expected.abs().max())


def test_a_seed_replays_the_flash_kernels_dropout_in_both_encodings():
    heads, starts = rows_of_heads()
    rows = (starts, max(LENGTHS), False, None)
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        draws.append(attend(heads, rows, 0.2))
    torch.manual_seed(5)
    with torch.no_grad():
        again = packed_attention(torch.nn.Module(), *heads, rows, 0.2, None).float()
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][0], again)
    for first, second in zip(draws[0][1:], draws[1][1:], strict=True):  # its backward adds in no fixed order
        assert cosine(first, second) > 0.9999
    assert cosine(draws[0][0], draws[2][0]) < 0.999


def test_the_flash_kernel_keeps_the_share_it_is_asked_to():
    """With equal scores and values of 1 a state is the share of kept tokens over the rate kept, in the mean 1."""
    lengths = [256] * 64
    heads, starts = rows_of_heads(lengths, num_key_heads=4)
    query, key = (torch.zeros_like(head) for head in heads[:2])
    torch.manual_seed(1)
    states = packed_attention(torch.nn.Module(), query, key, torch.ones_like(key), (starts, 256, False, None), 0.25, None).float()
    assert abs(float(states.mean()) - 1) < 0.003
    # A state is the mean of 256 draws, 1 / 0.75 with probability 0.75: their deviation is sqrt(0.25 / 0.75 / 256).
    assert float(states[..., 0].std()) == pytest.approx((0.25 / 0.75 / 256) ** 0.5, rel=0.1)


def gradients(encoder, inputs):
    """Return the embeddings and all gradients of a step under autocast, one behind the other."""
    encoder.zero_grad()
    inputs = {name: v.cuda() if torch.is_tensor(v) else v for name, v in inputs.items()}
    with torch.autocast("cuda", torch.bfloat16):
        embedding_nD = encoder(inputs)
    weight_nD = torch.randn(embedding_nD.shape, generator=torch.Generator().manual_seed(2)).cuda()
    (embedding_nD.float() * weight_nD).sum().backward()
    return embedding_nD.detach().float(), torch.cat([p.grad.flatten().float() for p in encoder.parameters()])


@pytest.mark.parametrize("prompt", [0, 2])
@pytest.mark.parametrize(
    ("family", "pooling"),
    [(family, "mean") for family in ("bert", "modernbert", "qwen3", "mistral", "gemma3_text")]
    + [("bert", pooling) for pooling in ("cls", "last", "max", "weighted_mean", "mean_sqrt", "latent")],
)
def test_a_packed_step_is_the_padded_one(family, pooling, prompt):
    encoder = build(family, pooling).cuda().eval()
    assert packs(encoder, CUDA, torch.bfloat16)
    padded, packed = (gradients(encoder, inputs) for inputs in inputs_of(prompt=prompt))
    assert cosine(packed[0], padded[0]) > 0.999
    assert cosine(packed[1], padded[1]) > 0.999
    assert float(packed[1].norm() / padded[1].norm()) == pytest.approx(1, abs=0.02)


def test_a_packed_step_in_float32_is_the_padded_one_by_the_reference():
    encoder = build("qwen3").cuda().eval()
    padded, packed = ({n: v.cuda() if torch.is_tensor(v) else v for n, v in inputs.items()} for inputs in inputs_of())
    torch.testing.assert_close(encoder(packed), encoder(padded), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max", "weighted_mean", "latent"])
def test_a_packed_step_waits_for_nothing_and_replays(pooling):
    encoder = build(pooling=pooling).cuda()
    packed = {name: v.cuda() if torch.is_tensor(v) else v for name, v in inputs_of(prompt=2)[1].items()}
    with torch.autocast("cuda", torch.bfloat16):
        encoder(packed).sum().backward()  # what is loaded at the first call may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.manual_seed(4)
            with_graph = encoder(packed)
            with_graph.sum().backward()
            torch.manual_seed(4)
            with torch.no_grad():
                without = encoder(packed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(with_graph, without)


def test_the_flash_kernel_is_what_runs(monkeypatch):
    monkeypatch.setattr(attention_module, "_padded", None)
    gradients(build().cuda(), inputs_of()[1])
