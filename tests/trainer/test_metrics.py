"""JSON lines always, a status that is replaced; a training step waits for neither, and a disk that fails ends no run."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.disk import fill, small_disk
from trainer.errors import InputError, MachineFailed, MustNotGoOn, RunInUse
from trainer.metrics import MetricsFile, NoMetrics, Status, TrainerMetrics, read_status, write_end
from trainer.trackers import Trackers

RECORDS = [
    (1, {"loss": 2.5, "event": "saved", "health/counts": [1, 2], "chunk_tokens": None}),
    (2, {"loss": 1.5, "eval/ndcg@10": 0.25}),
]


def record_all(metrics):
    for step, values in RECORDS:
        metrics.record(step, values)
    metrics.close()


def lines_of(run):
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_json_lines_hold_everything_whatever_the_trackers(tmp_path):
    for trackers in ((), ("tensorboard",)):
        run = tmp_path / str(len(trackers))
        record_all(TrainerMetrics(run, trackers))
        assert [{k: v for k, v in line.items() if k != "time"} for line in lines_of(run)] == [
            {"step": step, **values} for step, values in RECORDS
        ]
        assert (run / "logs" / "tensorboard").exists() == bool(trackers)


def test_tensorboard_has_the_numbers_by_step(tmp_path):
    record_all(TrainerMetrics(tmp_path))
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {"loss": [(1, 2.5), (2, 1.5)], "eval/ndcg@10": [(2, 0.25)]}


def test_half_a_line_of_a_full_disk_does_not_spoil_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    for step in (2, 3):
        metrics = MetricsFile(tmp_path / "metrics.jsonl")
        metrics.record(step, {})
        metrics.close()
    first, half, second, third = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert half == '{"st' and [json.loads(line)["step"] for line in (first, second, third)] == [1, 2, 3]


def test_lines_that_a_full_disk_refuses_are_written_when_it_has_room(tmp_path, caplog):
    caplog.set_level("INFO")
    disk = tmp_path / "disk"
    with small_disk(disk, "1m"):
        metrics = MetricsFile(disk / "metrics.jsonl")
        metrics.record(1, {})
        ballast = fill(disk)
        for step in range(2, 202):  # more than the page that the file has
            metrics.record(step, {"loss": 1.0})
        assert caplog.text.count("metrics wait until they can be written: no room left on the disk for") == 1
        ballast.unlink()
        metrics.record(202, {})
        metrics.close()
        found = {json.loads(line)["step"] for line in (disk / "metrics.jsonl").read_text().splitlines() if line.endswith("}")}
        assert found == set(range(1, 203)) and caplog.text.count("is written again") == 1


def stale(*_, **__):
    raise OSError(errno.ESTALE, "Stale file handle")


def test_a_stale_handle_is_opened_anew_and_no_line_is_lost(tmp_path, monkeypatch, caplog):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", stale)
        for step in (1, 2):
            metrics.record(step, {})
    os.rename(tmp_path / "metrics.jsonl", tmp_path / "gone")
    metrics.record(3, {})
    metrics.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3] and caplog.text.count("Stale file handle") == 1


def test_a_status_that_fails_for_a_while_ends_nothing_and_recovers(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    status = Status(tmp_path, "trainer", min_interval_s=0)
    status.update(phase="training", step=1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stale)
        for step in (2, 3):
            status.update(step=step)
            status.flush()
    assert read_status(tmp_path, "trainer")["step"] == 1 and caplog.text.count("Stale file handle") == 1
    status.update(step=4)
    status.flush()
    assert read_status(tmp_path, "trainer")["step"] == 4 and caplog.text.count("is written again") == 1


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that takes nothing until it is told to go on."""
    goes_on = threading.Event()
    for name in ("write", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real: (goes_on.wait(10), real(*args))[1])
    yield goes_on
    goes_on.set()


def test_a_step_does_not_wait_for_a_slow_disk_or_tracker_and_nothing_is_lost(tmp_path, slow_disk, monkeypatch):
    tracked = []
    monkeypatch.setattr(Trackers, "record", lambda _, step, numbers: (slow_disk.wait(10), tracked.append(step)))
    status = Status(tmp_path, "trainer", min_interval_s=0)
    metrics = TrainerMetrics(tmp_path, ())
    seen = []
    for step in range(1, 101):
        values = {"loss": float(step), "seen": seen}
        metrics.record(step, values)
        status.update(step=step)
        seen.append(step)  # the caller goes on: a line is of the moment in which it was handed over
    assert (tmp_path / "logs" / "metrics.jsonl").read_text() == "" and read_status(tmp_path, "trainer") == {}
    slow_disk.set()
    metrics.close()
    status.flush()
    assert [(line["step"], line["seen"][-1:]) for line in lines_of(tmp_path)] == [(s, [s - 1] * (s > 1)) for s in range(1, 101)]
    assert tracked == list(range(1, 101))
    assert read_status(tmp_path, "trainer")["step"] == 100


def test_a_slow_disk_gets_the_newest_status_and_not_every_one(tmp_path, slow_disk, monkeypatch):
    replaced = []
    monkeypatch.setattr("trainer.metrics._replace", lambda path, values: (slow_disk.wait(10), replaced.append(values["step"])))
    status = Status(tmp_path, "trainer", min_interval_s=0)
    for step in range(100):
        status.update(step=step)
    slow_disk.set()
    status.flush()
    assert len(replaced) <= 3 and replaced[-1] == 99


def test_a_lost_place_ends_the_loop_at_its_next_update(tmp_path):
    is_lost = threading.Event()

    def may_write():
        if is_lost.is_set():
            raise RunInUse("went over to start 2")

    status = Status(tmp_path, "trainer", may_write, min_interval_s=0)
    status.update(phase="training", step=1)
    is_lost.set()
    status.update(step=2)  # told behind the loop's back
    status.flush()  # says nothing, as the run ends for that reason
    for _ in range(2):  # a heartbeat's thread may hear it first
        with pytest.raises(RunInUse, match="went over to start 2"):
            status.update(step=3)
    with pytest.raises(RunInUse):
        status.update(phase="evaluating")
    status.flush()
    assert read_status(tmp_path, "trainer")["step"] == 1


def test_lines_reach_the_disk_though_nobody_closes(tmp_path):
    metrics = TrainerMetrics(tmp_path, ())
    metrics.record(1, {"loss": 1.0})
    deadline = time.monotonic() + 10
    while not lines_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [line["step"] for line in lines_of(tmp_path)] == [1]


def test_a_place_where_nobody_may_write_is_refused_before_anything():
    with pytest.raises(InputError, match=r"cannot write /proc/metrics\.jsonl"):
        MetricsFile(Path("/proc/metrics.jsonl"))


def test_an_end_is_told_even_where_the_disk_is_full(tmp_path, caplog):
    disk = tmp_path / "disk"
    no_room = MachineFailed("no room left")
    no_room.step = 9
    with small_disk(disk, "1m"):
        write_end(disk, "miner", InputError("no MPI"))  # nothing was told before
        assert read_status(disk, "miner") == {"phase": "refused", "error": "no MPI"}
        status = Status(disk, "trainer")
        status.update(phase="training", step=7, num_steps=20, swaps=[[0, 0]] * 100)
        write_end(disk, "trainer", no_room)
        told = {**status.values, "phase": "failed", "error": "no room left", "step": 9}
        assert told.items() <= read_status(disk, "trainer").items()
        status.update(phase="waiting")
        fill(disk)
        status.update(phase="training", step=8)
        assert "no room left on the disk" in caplog.text
        write_end(disk, "trainer", no_room)
        told = read_status(disk, "trainer")
        assert told.pop("pid") and told.pop("host")
        assert told == {"phase": "failed", "error": "no room left", "step": 9, "num_steps": 20}


def test_what_other_ranks_say_of_a_refusal_does_not_hide_it(tmp_path):
    write_end(tmp_path, "trainer", MustNotGoOn("collapsed"))
    write_end(tmp_path, "trainer", MachineFailed("rank 0 died"))
    assert read_status(tmp_path, "trainer") == {"phase": "must not go on", "error": "collapsed"}


def test_ranks_that_do_not_speak_record_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record_all(NoMetrics())
    assert list(tmp_path.iterdir()) == []
