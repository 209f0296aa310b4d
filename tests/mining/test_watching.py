"""A service of two ranks that waits for checkpoints: what it costs, what it tells, who else may come, and when it ends."""

import json
import re
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from launch.status import describe_run, run_status
from tests.mining.run import make_job, publish_checkpoint
from tests.mining.services import start_service
from trainer.handoff.manifest import read_latest
from trainer.metrics import Status, heartbeat_age_s, read_status

TIMEOUT_S = 120
IDLE_S = 5.0  # measured; the kernel counts in hundredths of a second


def wait_until(what, service) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not what():
        assert service.is_alive() and time.monotonic() < deadline, service.said
        time.sleep(0.05)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("watching"), mine={"bm25_top_k": 20})  # looked at as often as by default


@pytest.fixture(scope="module")
def run(job):
    return Path(job["run"]["folder"])


@pytest.fixture(scope="module")
def watching(job, run):
    """The service after its version from checkpoint 10; it ends when the trainer says that it has finished."""
    publish_checkpoint(job, 10)
    (run / "job.toml").write_text("")
    Status(run, "trainer").update(phase="training", step=17, loss=1.0, num_steps=40, eta_s=9, swaps=[])
    service = start_service(job, 2, ("--metrics-port", "0"))
    try:
        wait_until(lambda: (run / "negatives" / "v000001").exists() and is_watching(run), service)
        yield service
        assert service.is_alive(), f"it ended before the trainer did:\n{service.said}"
        Status(run, "trainer").update(phase="finished", step=40)
        assert service.wait() == 0, service.said
        assert read_status(run, "miner")["phase"] == "finished"
    finally:
        service.end()


def is_watching(run: Path) -> bool:
    return read_status(run, "miner").get("phase") == "watching"


def test_an_idle_service_takes_less_than_a_hundredth_of_a_core(watching):
    processes = [psutil.Process(rank.pid) for rank in watching.ranks.values()]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(IDLE_S)
    spent = [sum(process.cpu_times()[:2]) - start for process, start in zip(processes, before, strict=True)]
    assert len(spent) == 2 and max(spent) < 0.01 * IDLE_S, spent


def test_prometheus_status_and_json_lines_tell_the_same_figures(watching, run):
    port = re.search(r"http://127\.0\.0\.1:(\d+)/metrics", watching.said)
    figures = {}
    for line in urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/metrics").read().decode().splitlines():
        if line.startswith("negpool_miner_"):
            name, value = line.removeprefix("negpool_miner_").rsplit(" ", 1)
            figures[name] = float(value)
    status = run_status(run)["miner"]
    assert figures.pop('phase{phase="watching"}') == 1
    assert {name: figures.pop(f'dropped{{filter="{name}"}}') for name in status["dropped"]} == status["dropped"]
    assert status["dropped"]["judged"] > 0
    assert figures == {name: status[name] for name in figures}
    assert figures["negatives_age_steps"] == figures["checkpoint_age_steps"] == 7
    assert figures["recall"] == 1 and figures["negatives_version"] == 1 and figures["num_refused"] == 0
    assert figures["tokens_per_s"] > 0 and figures["queries_per_s"] > 0
    *_, searched, published, told = map(json.loads, (run / "logs" / "miner.jsonl").read_text().splitlines())
    assert searched["phase"] == "searching" and searched["queries_per_s"] == status["queries_per_s"]
    assert published["event"] == "published" and published["dropped"] == status["dropped"]
    assert (told["phase"], told["negatives_age_steps"]) == ("publishing", 7)
    text = describe_run(run_status(run))
    assert "newest negatives 7 steps old   checkpoint 7 steps old" in text and "recall 1.000" in text and "judged" in text


def test_its_heart_beats_whatever_this_machines_clock_says(watching, run, monkeypatch):
    first = run_status(run)["miner"]
    wait_until(lambda: run_status(run)["miner"]["heartbeat"] > first["heartbeat"], watching)
    monkeypatch.setattr(time, "time", lambda: first["heartbeat"] + 86_400)
    then = run_status(run)
    assert then["miner"]["heartbeat"] > first["heartbeat"] and 0 <= then["miner"]["heartbeat_age_s"] < 3600
    assert "miner    watching" in describe_run(then) and "silent" not in describe_run(then).splitlines()[2]


def test_a_second_service_says_so_and_leaves_the_first_at_work(watching, job, run):
    for num_ranks in (1, 2):
        second = start_service(job, num_ranks)
        assert second.wait() == 2, second.said
        assert second.said.count("negpool: another miner (process ") == second.said.count(f" is at work in {run}; wait for") == 1
        assert "Traceback" not in second.said
    assert read_status(run, "miner")["pid"] == watching.ranks[0].pid and is_watching(run)


def test_a_trainer_that_was_killed_or_stopped_may_come_back(watching, job, run):
    for phase in ("stopped", "evaluating", "preparing", "training"):
        Status(run, "trainer").update(phase=phase, step=30)
        time.sleep(1.5)
        assert watching.is_alive()
    publish_checkpoint(job, 30)
    wait_until(lambda: read_latest(run / "negatives") == "v000002", watching)
    assert heartbeat_age_s(run, "miner") is not None
