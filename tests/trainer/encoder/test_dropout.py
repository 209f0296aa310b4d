"""Dropout of our own: its rate, its gradient, its replay, and attention equal to the plain formula on the same draws."""

import pytest
import torch
from transformers import BertConfig, BertModel

from trainer.encoder import dropout as dropout_module
from trainer.encoder.attention import ATTENTION, attention_forward
from trainer.encoder.dropout import Dropout, keep_mask, replace_dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_dropped_and_the_mean_are_right(rate):
    torch.manual_seed(0)
    mask, scale = keep_mask(torch.empty(1001, 1003), rate)
    dropped = 1 - float(mask.float().mean())
    assert abs(dropped - rate) < 1 / 512 + 0.001, "the rate is rounded to 1/256; 0.001 is three standard deviations"
    assert abs(float(mask.float().mean()) * scale - 1) < 0.002 / (1 - rate)
    assert len(mask.float().mean(0).unique()) > 30, "columns differ"


def test_dropout_and_its_gradient_are_one_linear_map_that_a_seed_replays():
    layer, values = Dropout(0.3), torch.randn(50, 40, requires_grad=True)
    torch.manual_seed(5)
    first = layer(values)
    torch.manual_seed(5)
    assert torch.equal(layer(values), first)
    assert not torch.equal(layer(values), first)
    (gradient,) = torch.autograd.grad(first.sum(), values)
    torch.testing.assert_close(values * gradient, first)
    assert torch.equal(layer.eval()(values), values)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("block", [1, 7 * 4 * 6 * 6, 2**20])
def test_attention_is_the_plain_formula_on_the_same_draws(monkeypatch, is_padded, block):
    monkeypatch.setattr(dropout_module, "BLOCK_ELEMENTS", block)
    torch.manual_seed(1)
    num_rows, num_heads, num_tokens, width = 9, 4, 6, 8
    query, key, value = (torch.randn(num_rows, num_heads, num_tokens, width, requires_grad=True) for _ in range(3))
    lengths = torch.randint(1, num_tokens + 1, (num_rows,)) if is_padded else torch.full((num_rows,), num_tokens)
    allowed = (torch.arange(num_tokens) < lengths[:, None])[:, None, None, :].expand(-1, 1, num_tokens, -1)
    weight = torch.randn(num_rows, num_tokens, num_heads, width)

    torch.manual_seed(2)
    found, _ = attention_forward(torch.nn.Module(), query, key, value, allowed if is_padded else None, dropout=0.25)
    found_gradients = torch.autograd.grad((found * weight).sum(), (query, key, value))

    torch.manual_seed(2)
    rows_per_block = max(1, block // (num_heads * num_tokens**2))
    masks = [keep_mask(torch.empty(len(rows), num_heads, num_tokens, num_tokens), 0.25)
             for rows in torch.arange(num_rows).split(rows_per_block)]  # fmt: skip
    mask = torch.cat([m for m, _ in masks]) * masks[0][1]
    logits = (query @ key.transpose(-1, -2) * width**-0.5).masked_fill(~allowed, -torch.inf)
    expected = (torch.softmax(logits, -1) * mask) @ value
    expected = expected.transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for actual, wanted in zip(found_gradients, torch.autograd.grad((expected * weight).sum(), (query, key, value)), strict=True):
        assert float(wanted.abs().max()) > 0.01
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_a_model_with_it_is_the_same_model_without_dropout():
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=48), add_pooling_layer=False)  # fmt: skip
    mask = torch.tensor([[1] * n + [0] * (9 - n) for n in (9, 3, 5, 1)])
    inputs = {"input_ids": torch.randint(0, 50, (4, 9)), "attention_mask": mask}
    plain = model.eval()(**inputs).last_hidden_state
    replace_dropout(model)
    model.set_attn_implementation(ATTENTION)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).last_hidden_state[real], plain[real])
    assert not torch.allclose(model.train()(**inputs).last_hidden_state[real], plain[real], atol=1e-3)
    assert sum(isinstance(m, Dropout) for m in model.modules()) == 7
