"""The miner's benchmark at a size of seconds: real ranks, a real idle service, a real one whose memory is measured."""

import pytest

from launch.bench import idle, mining
from launch.tables import as_markdown, mining_parts
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.errors import InputError


def test_every_figure_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "SEARCH_QUERIES", 64)
    monkeypatch.setattr(mining, "SEARCH_PASSAGES", 5000)
    monkeypatch.setattr(mining, "RANKS", {"num_texts": 40, "max_tokens": 16, "num_queries": 64, "num_passages": 20000})
    monkeypatch.setattr(idle, "PAIRS", 8)
    monkeypatch.setattr(idle, "MAX_TOKENS", 16)
    data, model = str(write_tiny_dataset(tmp_path / "data")), str(write_tiny_encoder(tmp_path / "encoder"))
    found = mining.bench_mining(data, model, texts=20, max_tokens=16, rounds=2, passages=3000, half=None, peer=True)
    assert found["encoding"]["largest_difference"] < 1e-5 and found["encoding"]["tokens"] > 100
    assert found["ranks"]["speedup"].keys() == {"encode", "search", "bare product"}
    assert found["idle"]["ratio"] > 0 and found["idle"]["miner_ranks"] == 2
    assert found["memory"]["planned_gib"] > 0.2 and found["memory"]["peak_gib"] > 0.2
    said = as_markdown(mining_parts(found))
    assert "two ranks of one thread are" in said and "while a miner waits" in said and "A service with 3,000 passages" in said


def test_too_few_texts_are_refused(tmp_path):
    data, model = str(write_tiny_dataset(tmp_path / "data")), str(write_tiny_encoder(tmp_path / "encoder"))
    with pytest.raises(InputError, match="fewer than 100000; lower --texts"):
        mining.bench_mining(data, model, texts=100_000, max_tokens=16, rounds=1, passages=0, half=None, peer=False)
