"""BM25 in a service: what it plans, when it is left out or refused, and when a checkpoint takes its place."""

import json
import logging

import numpy as np
import pytest
from mpi4py import MPI

from mining import service
from mining.find.words import sum_over_ranks
from mining.find.words_plan import WordsPlan, measure, spread
from mining.ranks import Ranks
from tests.mining.run import as_job, make_job, publish_checkpoint
from tests.mining.test_service import folder
from trainer.data.datasets import open_data
from trainer.errors import InputError
from trainer.handoff.negatives import negatives_folder
from trainer.metrics import Status, read_status

GIB = 2**30


def mine(job, once=True):
    return service.run_service(as_job(job), MPI.COMM_SELF, once=once)


def events(job, name):
    lines = [json.loads(line) for line in (folder(job) / "logs" / "miner.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == name]


def made(job):
    return sorted(path.name for path in negatives_folder(folder(job)).glob("v*"))


def test_a_plan_is_said_and_progress_is_told_while_words_are_indexed_and_searched(tmp_path, monkeypatch, caplog):
    job, told, plain = make_job(tmp_path), [], Status.update
    monkeypatch.setattr(Status, "update", lambda self, **values: plain(self, **values) or told.append(dict(self.values)))
    with caplog.at_level(logging.INFO):
        mine(job)
    (plan,) = events(job, "bm25 plan")
    assert min(plan["index_s"], plan["search_s"]) > 0 and 0 < plan["num_bytes"] < plan["free_bytes"]
    assert "BM25 takes about " in caplog.text and made(job) == ["v000000"]
    ends = {status["phase"]: (status["done"], status["total"]) for status in told if status.get("total")}
    assert ends == {"indexing words": (398, 398), "searching with BM25": (225, 225)}
    caplog.clear()
    mine(job)
    assert len(events(job, "bm25 plan")) == 1, "there is a version 0, and nothing to plan"


@pytest.mark.parametrize("limit", ["bm25_minutes", "memory_gib"])
def test_version_0_is_left_out_aloud_where_it_takes_too_much(tmp_path, limit):
    job = make_job(tmp_path, mine={"bm25_top_k": 20, "poll_s": 0.2, limit: 1e-6})
    with pytest.raises(InputError, match=rf"BM25 is all that can be mined here, but BM25 would take .*mine\.{limit}"):
        mine(job)
    if limit == "memory_gib":
        return  # no checkpoint could be mined with it either
    publish_checkpoint(job, 10)
    mine(job)
    assert made(job) == ["v000001"]
    (warning,) = [each for each in read_status(folder(job), "miner")["warnings"] if each["kind"] == "bm25_left_out"]
    assert "more than mine.bm25_minutes=1e-06" in warning["sentence"] and "version 0 is left out" in warning["sentence"]


@pytest.mark.parametrize(
    "sections, sentence",
    [
        ({"search": {"top_k": 40, "bm25_top_k": 10}}, r"search\.bm25_top_k=10 asks for candidates, but BM25 would take"),
        (
            {"negatives": {"schedule": [{"step": 15, "checkpoint": 10}]}},
            r"negatives\.schedule begins with version 0 from BM25, but",
        ),
    ],
)
def test_what_cannot_do_without_bm25_is_refused_where_it_takes_too_long(tmp_path, sections, sentence):
    job = make_job(tmp_path, mine={"bm25_top_k": 20, "bm25_minutes": 1e-6}, **sections)
    publish_checkpoint(job, 10)
    with pytest.raises(InputError, match=sentence + r".*mine\.bm25_minutes=1e-06"):
        mine(job)
    assert made(job) == []


def test_a_checkpoint_takes_the_place_of_a_version_0_that_is_less_than_half_done(tmp_path, monkeypatch):
    monkeypatch.setattr("mining.work.FIRST_GIVES_WAY_S", 0.0)
    job = make_job(tmp_path, mine={"bm25_top_k": 20, "poll_s": 1e-6})
    publish_checkpoint(job, 10)
    Status(folder(job), "trainer").update(phase="finished")
    assert mine(job, once=False) == "finished"
    assert made(job) == ["v000001"]
    (given_up,) = events(job, "given up")
    assert given_up["version"] == 0 and "a checkpoint came before half of version 0" in given_up["reason"]
    once = make_job(tmp_path, run="once", mine={"bm25_top_k": 20, "poll_s": 1e-6})
    publish_checkpoint(once, 10)
    mine(once)
    assert made(once) == ["v000000", "v000001"], "a single refresh makes both"


def test_the_limits_are_minutes_and_memory():
    plan = WordsPlan(index_s=600, search_s=1800, num_bytes=3 * GIB, free_bytes=4 * GIB)
    assert plan.beyond(40) is None and "about 40 minutes, more than mine.bm25_minutes=39;" in plan.beyond(39)
    assert plan.as_text() == "BM25 takes about 10 minutes to index and 30 to search, and 3.00 GiB of a rank"
    small = WordsPlan(index_s=1, search_s=1, num_bytes=3 * GIB, free_bytes=2 * GIB)
    assert "3.00 GiB of a rank, more than the 2.00 GiB it has left; set mine.memory_gib" in small.beyond(30)


def test_planned_memory_grows_with_the_corpus_and_the_queries(tmp_path, monkeypatch):
    settings = as_job(make_job(tmp_path))
    data = open_data(settings.data, settings.sources)
    rows, own = np.arange(len(data.queries)), range(len(data.corpus))
    small = measure(data, own, rows, 20, 0)
    monkeypatch.setattr("mining.find.words_plan.SAMPLE_ROWS", 64)
    more, less = measure(data, own, np.tile(rows, 50), 20, 0), measure(data, range(100), rows, 20, 0)
    assert less.num_bytes < small.num_bytes < more.num_bytes


def test_a_sample_stands_in_runs_from_first_to_last():
    rows = spread(np.arange(1000, 11000), 256)
    assert len(np.unique(rows)) == 256 and rows[:64].tolist() == list(range(1000, 1064)) and 8000 < rows[-1] < 11000
    assert spread(np.arange(5), 64).tolist() == [0, 1, 2, 3, 4]


def test_one_rank_adds_up_to_what_it_has():
    numbers = np.arange(5)
    assert sum_over_ranks(Ranks(MPI.COMM_SELF, lambda: False), numbers).tolist() == numbers.tolist()
