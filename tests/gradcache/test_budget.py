"""Budgets: what autograd saves is counted, a limit is kept, and what does not fit is said."""

import pytest
import torch
from torch import nn

from gradcache import Budget, NoSync, Temperature, cached_step, probe_budget
from gradcache.budget import choose_budget, saved_bytes
from tests.gradcache.test_backends import SETTINGS
from tests.gradcache.test_step import TinyEncoder, make_batch


def test_saved_bytes_counts_each_storage_once_and_no_parameters():
    layer, values = nn.Linear(10, 20), torch.randn(7, 10).mul(1)
    # sigmoid saves its output; the second product saves the same input again, and both weights are parameters
    forward = lambda: (layer(values).sigmoid(), layer(values))  # noqa: E731
    assert saved_bytes(forward) == values.nbytes + 7 * 20 * 4


@pytest.mark.parametrize("gib", [0.5, 2, 40])
def test_a_budget_stays_within_its_limit(gib):
    limit, fixed, per_token = gib * 2**30, 3e6, 250e3
    budget = choose_budget(int(limit), fixed, per_token, longest=256, most_tokens=4096)
    assert 256 <= budget.chunk_tokens <= 4096
    chunk = fixed + per_token * budget.chunk_tokens
    assert budget.keep_graphs * chunk + fixed + 1.5 * per_token * budget.chunk_tokens <= limit
    assert (budget.keep_graphs + 1) * chunk + fixed + 1.5 * per_token * budget.chunk_tokens > limit


def test_too_little_for_one_text_is_a_sentence():
    with pytest.raises(ValueError, match=r"one text of 256 tokens needs 0\.09 GiB; set chunk\.memory_gib higher"):
        choose_budget(2**20, 3e6, 250e3, longest=256, most_tokens=4096)


def test_what_a_probe_chooses_holds_in_a_step(caplog):
    encoder, limit = TinyEncoder(0, 0.1).train(), 3_000_000
    batch = make_batch(0, 60, [encoder])
    caplog.set_level("INFO", "gradcache")
    budget = probe_budget(batch.towers, limit, torch.device("cpu"))
    assert "graphs kept" in caplog.text
    options = SETTINGS | {"chunk_tokens": budget.chunk_tokens, "keep_graphs": budget.keep_graphs}

    held = []

    def counted(inputs):
        if not torch.is_grad_enabled():
            return encoder(inputs)
        outputs = []
        held.append(saved_bytes(lambda: outputs.append(encoder(inputs))))
        return outputs[0]

    cached_step(make_batch(0, 60, [counted]), temperature=Temperature(0.1), sync=NoSync(), group=None, **options)
    kept = len(held) if budget.keep_graphs == "all" else budget.keep_graphs
    assert sum(sorted(held)[-kept:] if kept else []) + 1.5 * max(held) <= limit
    assert probe_budget(batch.towers, 2**34, torch.device("cpu")).keep_graphs == "all"
    assert Budget(100, "all").halved() == Budget(50, 0)
