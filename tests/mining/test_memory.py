"""The plan of a rank's memory, and a job that cannot fit."""

import json
from dataclasses import replace

import pytest

from mining import disk
from mining.job import ALL_ENCODINGS
from mining.memory import GIB, MAX_QUERY_TILE, Sizes, plan_memory
from tests.mining.run import as_job, make_job, publish_checkpoint
from tests.mining.test_service import folder, mine
from trainer.encoder.topk import tile_shape
from trainer.errors import InputError

SIZES = Sizes(
    num_queries=100_000,
    num_passages=2_000_000,
    shard_rows=4096,
    block_rows=65536,
    width=384,
    stored_bytes=4,
    token_width=8000,
    top_k=200,
    num_candidates=200,
    num_clustered=0,
    num_negatives=8,
    num_ranks=1,
    index_bytes=0,
    device_type="cpu",
)


def test_tiles_of_queries_shrink_until_they_fit():
    plenty = plan_memory(SIZES, GIB, 100 * GIB)
    assert plenty.query_tile == MAX_QUERY_TILE
    deep = replace(SIZES, top_k=1000, num_candidates=1000)
    plenty = plan_memory(deep, GIB, 100 * GIB)
    little = plan_memory(deep, GIB, plenty.total - 1)
    assert little.total < plenty.total and 0 < little.query_tile < plenty.query_tile
    assert little.query_tile % tile_shape(1000, "cpu")[0] == 0


def test_what_cannot_fit_is_refused_with_what_would():
    with pytest.raises(InputError, match=r"mine\.memory_gib=0\.50 is too little.*set mine\.memory_gib to \d\.\d+") as refused:
        plan_memory(SIZES, GIB // 2, GIB // 2)
    enough = float(str(refused.value).split("set mine.memory_gib to ")[1].split(" ")[0])
    assert plan_memory(SIZES, GIB // 2, int(enough * GIB)).total <= enough * GIB
    with pytest.raises(InputError):
        plan_memory(SIZES, GIB // 2, int((enough - 0.02) * GIB))


MORE = (
    {"width": 768},
    {"shard_rows": 65536},
    {"num_queries": 10**6},
    {"top_k": 4000, "num_candidates": 4000},
    {"num_clustered": 10**6},
    {"index_bytes": 400},
)


@pytest.mark.parametrize("more", MORE, ids=str)
def test_more_of_anything_takes_more(more):
    assert plan_memory(replace(SIZES, **more), GIB, 100 * GIB).total > plan_memory(SIZES, GIB, 100 * GIB).total


def test_passages_are_read_from_disk_and_hardly_count():
    grown = plan_memory(replace(SIZES, num_passages=20_000_000), 0, 100 * GIB).total - plan_memory(SIZES, 0, 100 * GIB).total
    assert grown == 18_000_000 * 24  # lengths, and keys of tokens and of texts


def test_the_room_on_the_disk_is_told_and_what_does_not_fit_is_warned_of(tmp_path, caplog, monkeypatch):
    job = make_job(tmp_path, mine={"bm25_top_k": 0})
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 40_000)
    publish_checkpoint(job, 10)
    mine(job)
    (planned,) = (json.loads(line) for line in (folder(job) / "logs" / "miner.jsonl").read_text().splitlines() if "disk" in line)
    written = sum(file.stat().st_size for file in folder(job).glob("shards/*/shard-*/embeddings.npy"))
    version = sum(file.stat().st_size for file in folder(job).glob("negatives/v000001/*.npy"))
    assert written < planned["to_write_gib"] * GIB < 1.2 * (written + version)
    assert planned["embeddings_gib"] == pytest.approx(2 * written / GIB, rel=0.05, abs=1e-4)
    (warned,) = (record.message for record in caplog.records if "disk of the run" in record.message)
    assert "0.00 GiB are free; free some, set encode.stored or mine.keep_encodings lower, or run.folder" in warned


def test_mining_without_a_run_tells_of_the_one_set_that_it_makes(tmp_path):
    job = as_job(make_job(tmp_path, mine={"keep_encodings": ALL_ENCODINGS}, encode={"stored": "fp32"}))
    job.run.folder.mkdir()
    assert disk.plan_disk(job, 10, 90, 32, 100).embeddings == 100 * 32 * 4


def test_a_service_that_cannot_fit_says_so_before_it_encodes(tmp_path):
    job = make_job(tmp_path, mine={"bm25_top_k": 0, "memory_gib": 0.1})
    publish_checkpoint(job, 10)
    with pytest.raises(InputError, match=r"mine\.memory_gib=0\.10 is too little"):
        mine(job)
    assert not list(folder(job).glob("shards/*/shard-*"))
