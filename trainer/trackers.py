"""TensorBoard, W&B and MLflow, by accelerate's trackers: one that does not start, or fails, takes nothing with it."""

import importlib.util
import logging
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import InputError

log = logging.getLogger(__name__)

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}  # by the package that each one needs
PROJECT = "negpool"  # what W&B calls a project and MLflow an experiment
PAUSE_S = 600.0  # before one that failed is asked again: a server that is gone may hold each call for minutes


class Trackers:
    """Those that have started; each gets every number, and one that fails is left alone for a while."""

    def __init__(self, names: tuple[str, ...], run: Path):
        """names: in TRACKERS, installed. W&B and MLflow take their servers from their own environment variables."""
        self._names, self._run = names, run
        self._trackers: dict[str, Any] = {}
        self._asked_again_at: dict[str, float] = {}  # those that have failed

    def start(self) -> None:
        """Start all; warns of one that does not. Clients keep things by thread, so one thread calls every method."""
        for name in self._names:
            try:
                self._trackers[name] = _start(name, self._run)
            except Exception as error:  # of the client's own making: not logged in, no such server, …
                log.warning("run.trackers: %s does not start (%s); the run goes on without it", name, _first_line(error))

    def record(self, step: int, numbers: dict[str, float]) -> None:
        """Give the numbers to all; warns once of one that fails, and says when it answers again."""
        for name in self._trackers:
            has_failed = name in self._asked_again_at
            if has_failed and time.monotonic() < self._asked_again_at[name]:
                continue
            is_done = self._is_done(name, partial(self._log, name, step, numbers, starts_anew=has_failed))
            if is_done and self._asked_again_at.pop(name, None) is not None:
                log.info("%s answers again, what came in between is only in logs/metrics.jsonl", name)

    def close(self) -> None:
        """Let all finish."""
        for name, tracker in self._trackers.items():
            self._is_done(name, tracker.finish)

    def _log(self, name: str, step: int, numbers: dict[str, float], starts_anew: bool) -> None:
        if starts_anew and name == "tensorboard":  # its writer says for ever what it met once
            self._trackers[name] = _start(name, self._run)
        self._trackers[name].log(numbers, step=step)

    def _is_done(self, name: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # whatever a client raises when its server is gone
            if name not in self._asked_again_at:
                log.warning("%s fails, the run goes on without it: %s", name, _first_line(error))
            self._asked_again_at[name] = time.monotonic() + PAUSE_S
            return False
        return True


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise InputError if a tracker is not installed; the miner, who needs none, does not ask."""
    for name in names:
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise InputError(f"run.trackers names {name!r}, which is not installed; run: pip install {TRACKERS[name]}")


def _start(name: str, run: Path) -> Any:
    """Return a tracker of accelerate's that has begun."""
    from accelerate import PartialState, tracking  # two seconds, which the miner should not pay

    PartialState()  # the trackers' own messages ask for it
    logs = run / "logs"
    if name == "wandb":
        tracker = tracking.WandBTracker(PROJECT, name=run.name, dir=str(logs))
    elif name == "mlflow":
        tracker = _MLflow(tracking.MLflowTracker(PROJECT, run_name=run.name))
    else:
        tracker = tracking.TensorBoardTracker("tensorboard", logs)  # the folder's name below logs/
        threading.excepthook = _without_tensorboards
    tracker.start()
    return tracker


def _without_tensorboards(failed: threading.ExceptHookArgs) -> None:
    """Print what a thread failed with, unless TensorBoard's writer hands it on: `record` says that in one sentence."""
    if type(failed.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failed)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


class _MLflow:
    """MLflow's tracker, with names that it takes: `eval/ndcg@10` is `eval/ndcg_10` there."""

    name = "mlflow"

    def __init__(self, tracker: Any):
        self.start, self.finish, self._log = tracker.start, tracker.finish, tracker.log

    def log(self, values: dict[str, float], step: int) -> None:
        self._log({re.sub(r"[^\w\-. :/]", "_", key): value for key, value in values.items()}, step=step)
