"""What a run tells the outside: JSON lines, TensorBoard, and a status file that is replaced by rename.

Ranks that do not record get the null objects, so that no loop asks whether recording is on.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Protocol

from trainer.handoff.manifest import write_atomically


class Metrics(Protocol):
    """A sink of records; `step` is the trainer's step."""

    def record(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """One JSON object a line, units in the keys, appended and flushed line by line."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - lives as long as the run

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; numbers, strings and lists of them."""
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def close(self) -> None:
        self._file.close()


class TrainerMetrics:
    """JSON lines in `logs/metrics.jsonl`, and every number among them in TensorBoard."""

    def __init__(self, run: Path):
        self._lines = MetricsFile(run / "logs" / "metrics.jsonl")
        from torch.utils.tensorboard import SummaryWriter  # takes two seconds, which the miner should not pay

        self._board = SummaryWriter(str(run / "logs" / "tensorboard"))

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Record one step or event."""
        self._lines.record(step, values)
        for key, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(key, value, step)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


class NoMetrics:
    """Records nothing: for the ranks that do not speak."""

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Status:
    """`status/SIDE.json`: phase, progress and heartbeat of one side of a run, for `status` and the live view."""

    def __init__(self, run: Path, side: str, min_interval_s: float = 0.5):
        self._path = run / "status" / f"{side}.json"
        self._values: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname()}
        self._written = 0.0
        self._min_interval_s = min_interval_s

    def update(self, **values: Any) -> None:
        """Merge values in and write the file, at most every `min_interval_s` unless the phase changed."""
        changed_phase = values.get("phase", self._values.get("phase")) != self._values.get("phase")
        self._values |= values
        if changed_phase or time.monotonic() - self._written >= self._min_interval_s:
            self._written = time.monotonic()
            write_atomically(self._path, json.dumps({**self._values, "heartbeat": time.time()}))


class NoStatus:
    """Tells nothing: for the ranks that do not speak."""

    def update(self, **values: Any) -> None:
        """Do nothing."""


def read_status(run: Path, side: str) -> dict[str, Any]:
    """Return what one side last wrote, or an empty dictionary."""
    try:
        return json.loads((run / "status" / f"{side}.json").read_text())
    except (OSError, ValueError):
        return {}
