"""Mixed precision: what clipping and the temperature see are true gradients; the loss keeps its precision."""

from dataclasses import replace

import pytest
import torch

from gradcache import InfoNCE, LossOptions, NoSync, Temperature, cached_step
from gradcache.objectives.tile import FLOOR, LOG_SUM_EXP, log_sum_exp, merge_all
from tests.gradcache.test_backends import LOSS, SETTINGS, full_gradients
from tests.gradcache.test_step import TinyEncoder, make_batch
from tests.gradcache.vectors import step_of_vectors, vectors
from tests.gradients import assert_same_gradients

STEP = SETTINGS | {"keep_graphs": 1}


def step(dtype=None, scaler=None, loss=LOSS):
    encoder, temperature = TinyEncoder(0, 0.0).train(), Temperature(0.1, learnable=True)

    def encode(inputs):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return encoder(inputs)

    result = cached_step(
        make_batch(0, 6, [encode]), loss=loss, temperature=temperature, sync=NoSync(encoder), group=None, scaler=scaler, **STEP
    )
    return encoder, temperature, result


def cosine(a, b):
    a, b = (torch.cat([gradient.flatten() for gradient in found.values()]) for found in (a, b))
    return float(torch.cosine_similarity(a, b, 0))


def test_unscaled_gradients_of_float16_are_those_of_float32_and_an_overflow_skips_the_step():
    encoder, temperature, exact = step()
    wanted = full_gradients([encoder], temperature)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    encoder, temperature, result = step(torch.float16, scaler)
    optimizer = torch.optim.SGD([*encoder.parameters(), *temperature.parameters()], lr=0.1)
    scaled = float(temperature.log_scale.grad)
    scaler.unscale_(optimizer)
    assert float(temperature.log_scale.grad) == pytest.approx(scaled / 2**10)
    found = full_gradients([encoder], temperature)
    assert result.loss == pytest.approx(exact.loss, rel=1e-2)
    assert cosine(found, wanted) > 0.999
    norms = [float(torch.nn.utils.get_total_norm(list(g.values()))) for g in (found, wanted)]
    assert norms[0] == pytest.approx(norms[1], rel=0.02), "clipping sees the true norm"
    before = encoder.bert.embeddings.word_embeddings.weight.clone()
    encoder.bert.embeddings.word_embeddings.weight.grad[3, 3] = torch.inf
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert torch.equal(encoder.bert.embeddings.word_embeddings.weight, before)


def test_without_float16_a_disabled_scaler_changes_nothing():
    plain = step()
    scaled = step(scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert_same_gradients(full_gradients([scaled[0]], scaled[1]), full_gradients([plain[0]], plain[1]))


def test_bfloat16_encoding_and_products_point_the_same_way():
    plain = step()
    for found in (step(torch.bfloat16), step(loss=replace(LOSS, product_dtype=torch.bfloat16))):
        assert found[2].loss == pytest.approx(plain[2].loss, rel=2e-2)
        assert found[2].loss != plain[2].loss
        assert cosine(full_gradients([found[0]], found[1]), full_gradients([plain[0]], plain[1])) > 0.99


def test_sums_over_a_wide_tile_are_those_of_float64():
    torch.manual_seed(0)
    q, p = (torch.nn.functional.normalize(torch.randn(n, 64), dim=1) for n in (4, 50_000))
    found = []
    for dtype in (torch.float32, torch.float64):
        rows, columns = (values.to(dtype, copy=True).requires_grad_() for values in (q, p))
        result, temperature = step_of_vectors(vectors(rows, columns), LossOptions(objective=InfoNCE()), 20.0)
        found.append((result.loss, float(temperature.log_scale.grad), rows.grad.double(), columns.grad.double()))
    (narrow_loss, narrow_scale, *narrow), (loss, scale, *wide) = found
    assert narrow_loss == pytest.approx(loss, rel=1e-6)
    assert narrow_scale == pytest.approx(scale, rel=1e-4)
    for gradient, wanted in zip(narrow, wide, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_log_sum_exp_is_torchs():
    torch.manual_seed(0)
    logits = (torch.randn(5, 40, dtype=torch.float64) * 30).index_fill(0, torch.tensor(3), FLOOR)  # a row without negatives
    logits[1, 7:] = FLOOR
    logits[2, 9:] = -torch.inf  # as in an objective of one's own
    logits.requires_grad_()
    found, wanted = log_sum_exp(logits), logits.logsumexp(1)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((value * torch.arange(1, 6)).sum(), logits)[0] for value in (found, wanted)]
    assert bool(gradients[1].isfinite().all()) and float(gradients[1].abs().sum()) > 1
    torch.testing.assert_close(*gradients)


def test_merged_weights_add_up_to_one_whatever_the_rounding_of_their_sum():
    torch.manual_seed(0)
    parts = 12 + torch.randn(3, 500, 1)  # of 3 ranks
    parts[0, 7], parts[:, 8] = FLOOR, FLOOR
    parts.requires_grad_()
    merged = merge_all(parts, [LOG_SUM_EXP])
    torch.testing.assert_close(merged.double(), parts.double().logsumexp(0), rtol=1e-6, atol=0)
    (weight,) = torch.autograd.grad(merged.sum(), parts)
    assert float((weight.sum(0) - 1).abs().max()) < 3e-7 < 2 * torch.finfo().eps * 12, "of float32, not of a number near 12"
    torch.testing.assert_close(weight, torch.softmax(parts.detach(), 0))
