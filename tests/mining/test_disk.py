"""The budget of the run's disk: what it says is what stays, and what cannot fit is refused before anything is encoded."""

import json

import pytest

from mining import disk
from mining.disk import plan_disk, version_bytes
from mining.job import ALL_ENCODINGS
from mining.memory import GIB
from mining.refresh import publish_drawn
from tests.mining.run import as_job, make_job, publish_checkpoint
from tests.mining.services import start_service
from tests.mining.test_service import folder, mine
from trainer.errors import InputError, MachineFailed


def planned(job) -> list[dict]:
    lines = (folder(job) / "logs" / "miner.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if "planned disk" in line]


def embedded(job) -> int:
    return sum(file.stat().st_size - 128 for file in folder(job).glob("shards/*/shard-*/embeddings.npy"))


@pytest.mark.parametrize("keep_encodings", [2, 3])
def test_what_the_plan_says_is_what_stays_and_what_is_there_counts_in_its_favour(tmp_path, monkeypatch, keep_encodings):
    job = make_job(tmp_path, mine={"bm25_top_k": 0, "keep_encodings": keep_encodings, "keep_versions": 2})
    at_most = []

    def publish_and_measure(*args):
        at_most.append(embedded(job))  # all is encoded, and nothing is deleted yet
        publish_drawn(*args)

    monkeypatch.setattr("mining.refresh.publish_drawn", publish_and_measure)
    for step in (10, 20, 30):
        publish_checkpoint(job, step)
        mine(job)
    plans, refresh = planned(job), at_most[0]
    assert [plan["embeddings_gib"] * GIB / refresh for plan in plans] == pytest.approx([2.0] * 3, rel=0.01)
    assert at_most == [refresh, 2 * refresh, 2 * refresh]
    versions = sum(file.stat().st_size - 128 for file in folder(job).glob("negatives/v*/*.npy"))
    assert len(list(folder(job).glob("negatives/v*"))) == 2
    assert versions == pytest.approx(plans[-1]["versions_gib"] * GIB, rel=0.05, abs=2000)
    there = [refresh * share + versions * number / 2 for number, share in enumerate((0, 1, 1))]
    assert [plan["there_gib"] * GIB for plan in plans] == pytest.approx(there, rel=0.05)
    assert plans[2]["to_write_gib"] == plans[0]["to_write_gib"] < plans[0]["needed_gib"]


def test_a_disk_that_cannot_hold_two_refreshes_is_refused_in_one_sentence(tmp_path):
    job = make_job(tmp_path, mine={"bm25_top_k": 0})
    publish_checkpoint(job, 10)
    run = start_service(job, before=little_room)
    assert run.wait() == 2, run.said
    (said,) = (line for line in run.said.splitlines() if line.startswith("negpool: "))
    # 225 queries and 398 passages, 32 numbers of 4 bytes, twice; 225 queries with 72 bytes each, kept 3 times.
    assert said.startswith("negpool: disk of the run: 0.23 MiB are needed (0.15 MiB for embeddings, 0.05 MiB for negatives that")
    assert "0.00 GiB of them are there, and 0.10 MiB are free" in said
    assert "free 0.13 MiB or more, set encode.stored=fp16, mine.keep_encodings or" in said
    assert said.endswith("or run.folder to another disk") and not list(folder(job).glob("shards/*/shard-*"))


def little_room(rank: int) -> None:
    disk.free_bytes = lambda folder: 100_000


def test_a_service_that_has_worked_waits_for_room(tmp_path, monkeypatch):
    job = as_job(make_job(tmp_path, encode={"stored": "fp32"}))
    job.run.folder.mkdir()
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 0)
    with pytest.raises(InputError, match="disk of the run"):
        plan_disk(job, 10, 90, 32, 100)
    with pytest.raises(MachineFailed, match="disk of the run"):
        plan_disk(job, 10, 90, 32, 100, starts=False)


def test_mining_without_a_run_needs_one_refresh_and_its_shards_count_where_they_are_there(tmp_path, monkeypatch):
    job = as_job(make_job(tmp_path, mine={"keep_encodings": ALL_ENCODINGS}, encode={"stored": "fp32"}))
    job.run.folder.mkdir()
    assert plan_disk(job, 10, 90, 32, 100).embeddings == 100 * 32 * 4
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 30 * 32 * 4 + 5 * version_bytes(job, 10))
    assert plan_disk(job, 10, 90, 32, 30).there == 70 * 32 * 4
    with pytest.raises(InputError):
        plan_disk(job, 10, 90, 32, 31)


def test_a_version_is_counted_with_all_its_columns(tmp_path):
    sample, rerank = {"num_negatives": 5, "replace": "easy"}, {"model": "some"}
    job = as_job(make_job(tmp_path, sample=sample, rerank=rerank, clusters={"num": 3}))
    assert version_bytes(job, 10) == 10 * (5 * (8 + 4 + 4 + 4) + 8 + 4 + 4 + 8)
