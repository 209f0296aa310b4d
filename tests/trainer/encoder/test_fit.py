"""Batches of texts, and tiles of the search, in less memory than they ask for."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.allocator import Memory
from trainer.encoder import fit
from trainer.encoder.shards import Shards
from trainer.encoder.topk import BestOf, best_of_keys, top_k
from trainer.handoff.manifest import open_version

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(fit, "_fitting", {})


def test_a_batch_that_does_not_fit_is_halved_once_and_the_next_ones_at_once(caplog):
    layer, rows_nD = nn.Linear(8, 1024), torch.randn(64, 8)
    lengths, called = torch.arange(64, 0, -1), []

    def encode(rows):
        called.append(len(rows))
        return layer(rows_nD[rows]).tanh()[:, :4].clone()

    with torch.inference_mode():
        wanted = encode(torch.arange(64))
        called.clear()
        with Memory(limit=40 * 2 * 1024 * 4) as memory:
            found = fit.encode_fitting(encode, lengths, CPU)
            assert called == [64, 16, 16, 32], "half of the tokens are in fewer than half of the rows"
            assert memory.num_refused == 1
            called.clear()
            again = fit.encode_fitting(encode, lengths, CPU)
    assert called == [16, 16, 32] and len(caplog.records) == 1
    assert "a batch of 64 texts, 2080 tokens, does not fit on cpu" in caplog.text
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found, again)
    assert fit.fitting_tokens(CPU, 4096) == fit.halved_to() == 1040 and fit.fitting_tokens(CPU, 100) == 100


def test_a_shard_says_what_its_batches_were_halved_to_and_another_one_nothing(tmp_path, monkeypatch):
    shards = Shards(tmp_path, 4, 2)
    shards.publish(0, np.zeros((2, 3), np.float32))
    monkeypatch.setattr(fit, "_fitting", {"cuda:0": 512})
    shards.publish(1, np.zeros((2, 3), np.float32))
    told = [open_version(tmp_path / f"shard-{number:06d}").get("batch_tokens") for number in (0, 1)]
    assert told == [None, 512]


def test_one_text_that_does_not_fit_is_the_error_itself():
    with Memory(limit=100), pytest.raises(torch.OutOfMemoryError, match="1,000"):
        fit.encode_fitting(lambda rows: torch.zeros(len(rows), 250), torch.ones(4), CPU)


def test_a_search_that_does_not_fit_goes_on_with_fewer_queries_and_finds_the_same(caplog):
    draw = np.random.default_rng(0)
    passage_ND, query_QD = (draw.integers(-3, 4, (n, 8)).astype(np.float32) for n in (5000, 130))
    with Memory() as memory:
        wanted = top_k(query_QD, passage_ND, 10)
    peak = memory.peak
    with Memory(limit=peak // 2) as memory:
        best = BestOf(query_QD, 10)
        best.look_at(passage_ND, np.arange(5000))
        found = best_of_keys([best.keys()], 10)
    assert 1 <= memory.num_refused <= 3 and "the search goes on with 65 queries at once" in caplog.text
    for values, right in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(values, right)
