"""The miner's benchmark at a size of seconds: real ranks and refreshes, an idle service, and one whose memory is measured."""

import json

import numpy as np
import pytest
import torch

from launch.bench import idle, mining, recall
from launch.bench.embedded import embed_data
from launch.bench.exact_search import SearchSize
from launch.bench.recall import Searched, measure_index
from launch.bench.report import write_report
from launch.bench.whole_refresh import write_part
from launch.mining_tables import mining_parts
from launch.tables import as_markdown
from mining.find.rates import clustered
from mining.work import ENCODING
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from trainer.data.datasets import open_dataset
from trainer.errors import InputError

CPU = torch.device("cpu")
TINY = mining.MiningSizes(texts=20, max_tokens=16, rounds=1, refreshed=30, passages=3000)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_dataset(tmp_path_factory.mktemp("texts") / "data")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_encoder(tmp_path_factory.mktemp("model") / "encoder"))


@pytest.fixture(scope="module")
def found(data, model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mining, "SEARCH", SearchSize(queries=64, passages=5000))
        patch.setattr(mining, "RANKS", {"num_texts": 40, "max_tokens": 16, "num_queries": 64, "num_passages": 20000})
        patch.setattr(idle, "PAIRS", 8)
        patch.setattr(idle, "MAX_TOKENS", 16)
        return mining.bench_mining(str(data), model, TINY, half=None, peer=True)


@pytest.fixture(scope="module")
def index():
    """An index over a few thousand passages in clusters, and beside it one for each of three blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "BLOCK_ROWS", 2048)
        patch.setattr(recall, "TOP_K", 20)
        made = clustered(100, 16, seed=1), clustered(5000, 16)
        return measure_index(Searched(*made, CPU), 0.35)


def test_every_figure_is_there(found):
    assert found["encoding"]["largest_difference"] < 1e-5 and found["encoding"]["tokens"] > 100
    assert found["refresh"]["ratio"] > 0 and found["refresh"]["passages"] == 30
    assert found["refresh"]["phases_s"].keys() >= {ENCODING, "searching"}
    assert found["ranks"]["speedup"].keys() == {"encode", "search", "bare product"}
    assert found["idle"]["ratio"] > 0 and found["idle"]["miner_ranks"] == 2
    assert found["memory"]["planned_gib"] > 0.2 and found["memory"]["peak_gib"] > 0.2
    said = as_markdown(mining_parts(found))
    assert "two ranks of one thread are" in said and "while a miner waits" in said and "A service with 3,000 passages" in said
    assert "of its bare parts; wanted at most 1.10" in said


def test_an_index_that_is_measured_finds_enough_and_says_what_it_took(index):
    assert index["factory"] == "IVF64,Flat" and index["recall"] >= 0.95
    assert index["index_s"] == sum(seconds for name, seconds in index["seconds"].items() if name != "exact")
    assert index["ratio"] == round(index["index_s"] / index["seconds"]["exact"], 3)
    for points in (index["points"], index["points_of_blocks"]):
        shares, recalls = ([point[key] for point in points] for key in ("share", "recall"))
        assert shares == sorted(shares) and recalls == sorted(recalls) and 0 < shares[0] < shares[-1] <= 1


def test_one_index_finds_more_than_one_for_every_block_by_the_same_work(index):
    of_one, of_blocks = index["points"], index["points_of_blocks"]
    first = of_blocks[0]
    assert max(point["recall"] for point in of_one if point["share"] <= first["share"]) > first["recall"]


def test_a_report_has_a_picture_of_what_is_found_by_what_is_looked_at(found, index, tmp_path):
    pytest.importorskip("matplotlib")
    report = {**found, "index": {"made": index}}
    write_report(tmp_path, "mining", report, mining_parts(report))
    said = (tmp_path / "mining.md").read_text()
    assert "![recall](recall.png)" in said and "it takes" in said and "| nprobe | passages looked at | recall@20 |" in said
    assert json.loads((tmp_path / "mining.json").read_text())["index"]["made"]["points"] == index["points"]
    assert min((tmp_path / name).stat().st_size for name in ("mining.png", "recall.png")) > 5000


def test_embeddings_are_made_once(data, model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    query_QD, passage_ND = embed_data(data, model, 16, 5, 12)
    assert len(query_QD) == 5 and len(passage_ND) == 12 and np.allclose(np.linalg.norm(passage_ND, axis=1), 1, atol=1e-5)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")}
    assert np.array_equal(embed_data(data, model, 16, 5, 12)[1], passage_ND)
    assert files and files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")}


def test_a_part_of_a_data_set_has_the_queries_whose_positives_are_in_it(data, tmp_path):
    write_part(data, 10, tmp_path / "part")
    whole, part = open_dataset(data, None), open_dataset(tmp_path / "part", tmp_path / "cache")
    assert part.corpus["text"][:] == whole.corpus["text"][:10]
    pairs = {
        (whole.queries["text"][int(query)], whole.corpus["text"][int(passage)])
        for query, passage in zip(whole.qrels["train"].query_rows, whole.qrels["train"].corpus_rows, strict=True)
        if passage < 10
    }
    train = part.qrels["train"]
    rows = zip(train.query_rows.tolist(), train.corpus_rows.tolist(), strict=True)
    assert {(part.queries["text"][query], part.corpus["text"][passage]) for query, passage in rows} == pairs and pairs
    write_part(data, 10**6, tmp_path / "all")
    assert len(open_dataset(tmp_path / "all", tmp_path / "cache").corpus) == len(whole.corpus)


def test_too_few_texts_are_refused(data, model):
    sizes = mining.MiningSizes(texts=100_000, max_tokens=16, rounds=1)
    with pytest.raises(InputError, match="fewer than 100000; lower --texts"):
        mining.bench_mining(str(data), model, sizes, half=None, peer=False)


def test_too_small_an_index_is_refused(data, model):
    with pytest.raises(InputError, match=r"--index-passages 100 is too few for an index of lists; set it to 4096 or more"):
        mining.bench_mining(str(data), str(model), mining.MiningSizes(indexed=100), half=None, peer=False)
