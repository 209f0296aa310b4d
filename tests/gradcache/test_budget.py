"""Budgets: what autograd saves is counted, a limit is kept, and what does not fit is said."""

import pytest
import torch
from torch import nn

from gradcache import Budget, NoSync, Temperature, Tower, cached_step, probe_budget
from gradcache.budget import BACKWARD_SHARE, CHUNK_SHARE, GraphCost, choose_tokens, measure_graphs, saved_bytes
from gradcache.plan import encode_chunk, plan_encoding
from tests.gradcache.test_backends import LOSS, SETTINGS
from tests.gradcache.test_step import TinyEncoder, make_batch


def test_saved_bytes_counts_each_storage_once_and_no_parameters():
    layer, values = nn.Linear(10, 20), torch.randn(7, 10).mul(1)
    # sigmoid saves its output; the second product saves the same input again, and both weights are parameters
    forward = lambda: (layer(values).sigmoid(), layer(values))  # noqa: E731
    assert saved_bytes(forward) == values.nbytes + 7 * 20 * 4


@pytest.mark.parametrize("gib", [0.5, 2, 40])
def test_a_chunk_takes_its_share_of_the_limit(gib):
    cost = GraphCost(3e6, 200e3, 200.0)
    tokens = choose_tokens(gib * 2**30, cost, longest=256, most_tokens=4096)
    assert 256 <= tokens <= 4096 and tokens % 256 == 0
    assert BACKWARD_SHARE * cost.of(tokens, 256) <= CHUNK_SHARE * gib * 2**30
    assert tokens == 4096 or BACKWARD_SHARE * cost.of(tokens + 256, 256) > CHUNK_SHARE * gib * 2**30


def test_too_little_for_one_text_is_a_sentence():
    with pytest.raises(ValueError, match=r"one text of 256 tokens needs 0\.09 GiB; set chunk\.memory_gib higher"):
        choose_tokens(2**20, GraphCost(3e6, 200e3, 200.0), longest=256, most_tokens=4096)


def test_the_cost_of_a_graph_is_found_for_other_chunks_than_those_probed():
    width = 8

    def attention_like(rows):
        """Save some for each token, and for each pair of tokens."""
        tokens_nLD = layer(torch.zeros(len(rows), int(lengths[rows].max()), width)).sigmoid()
        weights_nLL = (tokens_nLD @ tokens_nLD.transpose(1, 2)).sigmoid()
        return (weights_nLL @ tokens_nLD).sum(1)

    layer, lengths = nn.Linear(width, width), torch.arange(4, 260)
    tower = Tower(encode=attention_like, lengths=lengths, load=lambda rows: rows)
    cost = measure_graphs(tower)
    for chunk in plan_encoding([tower], 3000, 0, 0, 0).chunks:
        actual = saved_bytes(lambda chunk=chunk: encode_chunk(chunk, with_graph=True))
        assert cost.of(chunk.num_padded_tokens, int(chunk.lengths.max())) == pytest.approx(actual, rel=0.05)


def test_what_a_probe_chooses_holds_in_a_step(caplog):
    encoder, limit = TinyEncoder(0, 0.1).train(), 3_000_000
    batch = make_batch(0, 60, [encoder])
    caplog.set_level("INFO", "gradcache")
    budget = probe_budget(batch.towers, limit, torch.device("cpu"))
    assert "graphs kept" in caplog.text
    options = SETTINGS | {"loss": LOSS, "chunk_tokens": budget.chunk_tokens, "keep_graphs": budget.keep_graphs}

    held = []

    def counted(inputs):
        if not torch.is_grad_enabled():
            return encoder(inputs)
        outputs = []
        held.append(saved_bytes(lambda: outputs.append(encoder(inputs))))
        return outputs[0]

    cached_step(make_batch(0, 60, [counted]), temperature=Temperature(0.1), sync=NoSync(), group=None, **options)
    kept = len(held) if budget.keep_graphs == "all" else budget.keep_graphs
    assert kept and sum(held[:kept]) + 0.5 * max(held) <= limit, "kept graphs come first"
    assert sum(held[:kept]) > 0.5 * limit and BACKWARD_SHARE * max(held) <= limit
    assert probe_budget(batch.towers, 2**34, torch.device("cpu")).keep_graphs == "all"
    assert Budget(100, "all").halved() == Budget(100, 0) and Budget(100, 0).halved() == Budget(50, 0)
