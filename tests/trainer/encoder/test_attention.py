"""Attention as models call it: no mask that nobody needs, no plan of cuDNN's, no wait for the device, nothing quietly wrong."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.trainer.encoder.test_packed import CONFIGS, assert_same_step, build, inputs_of, step
from trainer.encoder import attention as attention_module
from trainer.encoder.attention import attention_forward, packed_attention, packed_marker
from trainer.encoder.pooling import POOLINGS

EQUAL = [7, 7, 7, 7, 7]


@pytest.fixture
def masks(monkeypatch):
    """Return the masks that reach torch's attention."""
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        seen.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen3"])
def test_texts_of_one_length_need_no_mask(masks, family):
    encoder = build(family).eval()
    padded, _ = inputs_of(EQUAL)
    expected = step(encoder, padded)
    masks.clear()
    del padded["attention_mask"]
    assert_same_step(step(encoder, padded), expected)
    assert masks == [None, None], "one for each layer"


@pytest.mark.parametrize("pooling", [*POOLINGS, "latent"])
def test_every_pooling_works_without_a_mask(pooling):
    encoder = build(pooling=pooling).eval()
    padded, _ = inputs_of(EQUAL)
    assert_same_step(step(encoder, {"input_ids": padded["input_ids"]}), step(encoder, padded))


def test_packed_texts_need_no_mask_but_inside_the_reference(masks):
    build().eval()(inputs_of()[1])
    assert [mask.shape for mask in masks] == [(6, 1, 31, 31)] * 2


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_step_on_a_device_waits_for_nothing(monkeypatch, family):
    """On the meta device whatever would wait fails: there are no values to wait for. Flash has its shapes there, too."""
    monkeypatch.setattr(attention_module, "flash_dtype", lambda value: torch.bfloat16)
    for pooling, prompt in (("mean", 0), ("cls", 2), ("latent", 0)) if family == "bert" else (("last", 0),):
        encoder = build(family, pooling).to("meta", torch.bfloat16)
        for inputs in inputs_of(prompt=prompt):
            encoder({name: v.to("meta") if torch.is_tensor(v) else v for name, v in inputs.items()}).sum().backward()
            assert all(p.grad is not None and p.grad.shape == p.shape for p in encoder.parameters())


def test_the_meta_device_fails_where_something_waits():
    with pytest.raises(RuntimeError):
        bool(torch.ones(3, device="meta").all())
    with pytest.raises(NotImplementedError):
        torch.ones(3, device="meta").cpu()


def test_a_model_that_does_not_say_where_texts_start_fails(monkeypatch):
    encoder = build()
    silent = encoder.layers()[1].attention.self
    kept = silent.forward
    monkeypatch.setattr(silent, "forward", lambda states, attention_mask, **_: kept(states, attention_mask))
    with pytest.raises(NotImplementedError, match="the model around BertSelfAttention keeps to itself where packed texts start"):
        encoder(inputs_of()[1])
    head = torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError):  # as a model that calls torch itself would
        torch.nn.functional.scaled_dot_product_attention(head, head, head, attn_mask=packed_marker(head.device))


def test_what_a_family_adds_to_attention_is_refused():
    head = torch.randn(1, 2, 5, 8)
    rows = {"cu_seq_lens_q": torch.tensor([0, 5], dtype=torch.int32), "max_length_q": 5}
    with pytest.raises(NotImplementedError, match="Module has softcap, with which attention takes no packed texts"):
        attention_forward(torch.nn.Module(), head, head, head, None, softcap=30.0, **rows)


@pytest.mark.parametrize("is_flash", [False, True])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 3), (True, 3)])
def test_packed_attention_is_the_plain_formula_text_by_text(monkeypatch, causal, window, is_flash):
    torch.manual_seed(0)
    query = torch.randn(1, 4, 12, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, 12, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    starts = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    if is_flash:  # torch's arguments, with the kernel written out in Python
        monkeypatch.setattr(attention_module, "flash_dtype", lambda value: torch.float64)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    found = packed_attention(module, query, key, value, (starts, 6, causal, window), 0.0, 0.4)
    reach = (window or 99) - 1
    ends = ((0, 5), (5, 6), (6, 12))
    expected = torch.cat([plain(query[0], key[0], value[0], slice(*e), reach, 0 if causal else reach, 0.4) for e in ends])
    torch.testing.assert_close(found[0], expected)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in (found[0], expected)]
    torch.testing.assert_close(*gradients)


def flash(query_THd, key, value, starts, starts_k, longest, longest_k, dropout, is_causal, is_debug, *, scale,
          window_size_left=None, window_size_right=None):  # fmt: skip
    """Return what torch's kernel does, by the documentation of torch.nn.attention.varlen: -1 is no window."""
    assert starts is starts_k and longest == longest_k == 6 and dropout == 0 and not is_debug and starts.dtype == torch.int32
    left, right = (99 if side in (None, -1) else side for side in (window_size_left, window_size_right))
    heads = [t.transpose(0, 1) for t in (query_THd, key, value)]
    texts = [slice(*ends) for ends in itertools.pairwise(starts.tolist())]
    return torch.cat([plain(*heads, text, left, 0 if is_causal else right, scale) for text in texts]), None


def plain(query_HTd, key, value, text, left, right, scale):
    """Return the (L, H, d) states of one text, whose tokens see so many others on their left and on their right."""
    place = torch.arange(text.stop - text.start)
    ahead = place - place[:, None]
    hidden = (ahead > right) | (-ahead > left)
    states = []
    for head in range(4):
        scores = scale * query_HTd[head, text] @ key[head // 2, text].T
        states.append(torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ value[head // 2, text])
    return torch.stack(states, 1)


def test_dropout_of_packed_texts_is_that_of_the_padded_ones_on_the_same_draws():
    torch.manual_seed(0)
    head = torch.randn(1, 2, 12, 8)
    starts = torch.tensor([0, 6, 12], dtype=torch.int32)
    torch.manual_seed(1)
    found = packed_attention(torch.nn.Module(), head, head, head, (starts, 6, False, None), 0.3, None)
    padded = head.view(2, 2, 6, 8).transpose(0, 1)  # HnLd -> nHLd
    torch.manual_seed(1)
    expected, _ = attention_forward(torch.nn.Module(), padded, padded, padded, None, 0.3)
    torch.testing.assert_close(found, expected.reshape(1, 12, 2, 8))
    torch.manual_seed(2)
    assert not torch.allclose(packed_attention(torch.nn.Module(), head, head, head, (starts, 6, False, None), 0.3, None), found)


def test_cudnn_is_off_around_our_calls_on_a_gpu_and_nowhere_else(monkeypatch):
    found = []

    def spy(*args, **kwargs):
        found.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return None, None

    monkeypatch.setattr(attention_module, "sdpa_attention_forward", spy)
    with FakeTensorMode(), torch.no_grad():
        for device in ("cuda", "cpu"):
            head = torch.empty(2, 4, 6, 8, device=device)
            attention_forward(torch.nn.Module(), head, head, head, None)
    assert found == [(False, True), (True, True)] and torch.backends.cuda.cudnn_sdp_enabled()
