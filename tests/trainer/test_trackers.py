"""Trackers by name, real ones where they are installed; one that fails takes nothing with it."""

import errno
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.test_metrics import RECORDS, lines_of, record_all, stale
from trainer.errors import InputError
from trainer.handoff.settings import RunSettings
from trainer.metrics import TrainerMetrics
from trainer.trackers import PAUSE_S, TRACKERS, Trackers, check_trackers


def started(run, *names):
    trackers = Trackers(names, run)
    trackers.start()
    return trackers


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
    trackers = started(tmp_path, "wandb", "tensorboard")
    wandb.is_gone = True
    trackers.record(*RECORDS[0])
    wandb.is_gone = False
    trackers.record(2, {"loss": 1.5})
    assert len(wandb.calls) == 1, "a server that is gone may hold every call for minutes"
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + PAUSE_S)
    trackers.record(3, {"loss": 0.5})
    trackers.close()
    assert caplog.text.count("wandb fails, the run goes on without it: no route to host") == 1
    assert caplog.text.count("wandb answers again") == 1
    assert wandb.calls[1:] == [(3, {"loss": 0.5}), ("finish", None)]
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("loss")) == 3


def test_tensorboard_begins_a_new_file_when_its_disk_is_well_again(tmp_path, monkeypatch):
    trackers = started(tmp_path, "tensorboard")
    trackers.record(1, {"loss": 2.5})
    with monkeypatch.context() as patched:
        patched.setattr("torch.utils.tensorboard.SummaryWriter.flush", stale)
        trackers.record(2, {"loss": 1.5})
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + PAUSE_S)
    trackers.record(3, {"loss": 0.5})
    trackers.close()
    assert len(list((tmp_path / "logs" / "tensorboard").glob("events*"))) == 2


def test_the_thread_of_tensorboard_fails_without_a_traceback(tmp_path, monkeypatch, capsys, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has one of its own
    metrics = started(tmp_path, "tensorboard")
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
