"""The comparison of lists with exact search, at a size of a test."""

from launch.bench.lists import measure_lists
from mining.find import rates


def test_an_index_is_compared_with_exact_search_at_a_recall(monkeypatch):
    monkeypatch.setattr(rates, "MEASURED_LISTS", 16)
    monkeypatch.setattr(rates, "SAMPLE_PASSAGES", 1024)
    chosen = measure_lists(num_passages=8192, num_queries=300, width=16, k=10)
    given = measure_lists(num_passages=4096, num_queries=300, width=16, k=10, factory="IVF32,SQ8", min_recall=0.99)
    assert chosen["factory"] in ("IVF64,Flat", "IVF128,Flat") and given["factory"] == "IVF32,SQ8"
    for found, wanted in ((chosen, 0.95), (given, 0.99)):
        assert found["recall"] > wanted - 0.03 and found["seconds"].keys() == {"exact", "train", "fill", "audit", "search"}
        assert found["of_exact"] > 0 and 1 <= found["nprobe"] <= found["lists"]
