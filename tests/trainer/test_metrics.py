"""JSON lines always; trackers by name, real ones where they are installed; one that fails takes nothing with it."""

import errno
import json
import os
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.disk import fill, small_disk
from trainer.errors import InputError, MachineFailed, MustNotGoOn
from trainer.handoff.settings import RunSettings
from trainer.metrics import MetricsFile, NoMetrics, Status, TrainerMetrics, read_status, write_end
from trainer.trackers import PAUSE_S, TRACKERS, check_trackers

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


def test_mlflow_has_the_numbers_under_names_that_it_takes(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    record_all(TrainerMetrics(tmp_path / "run", ("mlflow", "tensorboard")))
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "negpool"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 2.5), (2, 1.5)]
    assert run.data.metrics["eval/ndcg_10"] == 0.25


class StoodInServer:
    """What W&B and MLflow are asked to do, kept in a list."""

    def __init__(self):
        self.__spec__ = ModuleSpec("stood_in", None)  # accelerate looks whether there is one
        self.calls = []
        self.is_gone = False

    def init(self, **options):
        self.calls.append(("init", options))
        return SimpleNamespace(log=self.log, finish=lambda: self.calls.append(("finish", None)))

    def log(self, values, step):
        if self.is_gone:
            raise ConnectionError("no route to host")
        self.calls.append((step, values))


def test_mlflow_is_told_the_experiment_the_run_and_names_that_it_takes(tmp_path, monkeypatch):
    server, started = StoodInServer(), []
    server.search_experiments = lambda filter_string: []
    server.create_experiment = lambda name, **_: name
    server.start_run = lambda **options: started.append((options["experiment_id"], options["run_name"]))
    server.log_metrics = server.log
    server.end_run = lambda: server.calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, "mlflow", server)
    record_all(TrainerMetrics(tmp_path / "run", ("mlflow",)))
    assert started == [("negpool", "run")]
    assert server.calls == [(1, {"loss": 2.5}), (2, {"loss": 1.5, "eval/ndcg_10": 0.25}), ("finish", None)]


@pytest.fixture
def wandb(monkeypatch):
    server = StoodInServer()
    monkeypatch.setitem(sys.modules, "wandb", server)
    return server


def test_wandb_is_told_the_project_the_run_and_every_number(tmp_path, wandb):
    run = tmp_path / "my-run"
    record_all(TrainerMetrics(run, ("wandb",)))
    (_, options), *logged, (last, _) = wandb.calls
    assert options == {"project": "negpool", "name": "my-run", "dir": str(run / "logs")}
    assert logged == [(1, {"loss": 2.5}), (2, {"loss": 1.5, "eval/ndcg@10": 0.25})] and last == "finish"


def test_a_tracker_that_fails_is_left_alone_for_a_while_and_the_others_go_on(tmp_path, wandb, caplog, monkeypatch):
    caplog.set_level("INFO")
    metrics = TrainerMetrics(tmp_path, ("wandb", "tensorboard"))
    wandb.is_gone = True
    metrics.record(*RECORDS[0])
    wandb.is_gone = False
    metrics.record(*RECORDS[1])
    assert len(wandb.calls) == 1, "a server that is gone may hold every call for minutes"
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + PAUSE_S)
    metrics.record(3, {"loss": 0.5})
    metrics.close()
    assert caplog.text.count("wandb fails, the run goes on without it: no route to host") == 1
    assert caplog.text.count("wandb answers again") == 1
    assert wandb.calls[1:] == [(3, {"loss": 0.5}), ("finish", None)]
    assert len(lines_of(tmp_path)) == 3
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("loss")) == 3


def test_tensorboard_begins_a_new_file_when_its_disk_is_well_again(tmp_path, monkeypatch):
    metrics = TrainerMetrics(tmp_path)
    metrics.record(*RECORDS[0])
    with monkeypatch.context() as patched:
        patched.setattr("torch.utils.tensorboard.SummaryWriter.flush", stale)
        metrics.record(*RECORDS[1])
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + PAUSE_S)
    metrics.record(3, {"loss": 0.5})
    metrics.close()
    assert len(list((tmp_path / "logs" / "tensorboard").glob("events*"))) == 2


def test_the_thread_of_tensorboard_fails_without_a_traceback(tmp_path, monkeypatch, capsys, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has one of its own
    metrics = TrainerMetrics(tmp_path)
    monkeypatch.setattr("tensorboard.compat.tensorflow_stub.io.gfile.LocalFileSystem.append", refuse)
    for step in range(3):
        metrics.record(step, {"loss": 0.5})
    metrics.close()
    assert caplog.text.count("tensorboard fails, the run goes on without it: [Errno 28] No space left on device") == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_tracker_that_does_not_start_or_end_is_left_out(tmp_path, wandb, caplog):
    def refuse(**_):
        raise ConnectionError("No API key configured. Use `wandb login`.\nMore lines")

    wandb.init = refuse
    record_all(TrainerMetrics(tmp_path, ("wandb",)))
    assert "run.trackers: wandb does not start (No API key configured. Use `wandb login`); the run goes on" in caplog.text
    assert len(lines_of(tmp_path)) == 2
    wandb.init = lambda **_: SimpleNamespace(log=wandb.log, finish=refuse)
    record_all(TrainerMetrics(tmp_path, ("wandb",)))
    assert len(lines_of(tmp_path)) == 4


def test_a_tracker_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    check_trackers(("tensorboard", "mlflow"))
    with pytest.raises(InputError, match=r"run\.trackers names 'wandb', which is not installed; run: pip install wandb"):
        check_trackers(("tensorboard", "wandb"))


def test_a_run_may_name_every_tracker_or_none():
    assert RunSettings(trackers=()).trackers == ()
    assert RunSettings(trackers=tuple(TRACKERS)).trackers == tuple(TRACKERS)


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
    assert read_status(tmp_path, "trainer")["step"] == 1 and caplog.text.count("Stale file handle") == 1
    status.update(step=4)
    assert read_status(tmp_path, "trainer")["step"] == 4 and caplog.text.count("is written again") == 1


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
