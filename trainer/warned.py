"""What is wrong with a side of a run now: said once when it begins, taken back once when it is over.

Each kind of warning stands in the log, in the side's status file under `warnings`, and in its JSON lines. A run goes on
whatever is warned of; what must not go on is an error.
"""

import logging
from typing import Any

from trainer.metrics import Metrics, NoMetrics, NoStatus, Status

log = logging.getLogger(__name__)


class Warnings:
    """The warnings of one side, one of a kind, the newest last. Null sinks make a rank that does not speak keep silent."""

    def __init__(self, status: Status | NoStatus, metrics: Metrics):
        self._status, self._metrics = status, metrics
        self._speaks = not isinstance(metrics, NoMetrics)
        self.now: list[dict[str, Any]] = []  # {"kind", "sentence", "step"}

    def tell(self, kind: str, sentence: str | None, step: int | None) -> None:
        """Say that a kind of trouble has begun, or with None that there is none of it (any more).

        The sentence of a kind that is there already replaces the older one where people look, and is not logged again.
        """
        earlier = next((warning for warning in self.now if warning["kind"] == kind), None)
        if sentence is None:
            if earlier is not None:
                self.now.remove(earlier)
                self._record(step, {"event": "warning over", "kind": kind}, f"over: {earlier['sentence']}")
            return
        if earlier is not None:
            earlier["sentence"] = sentence
        else:
            self.now.append({"kind": kind, "sentence": sentence, "step": step})
            self._record(step, {"event": "warning", "kind": kind, "sentence": sentence}, sentence)
        self._status.update(warnings=self.now)

    def _record(self, step: int | None, values: dict[str, Any], words: str) -> None:
        self._status.update(warnings=self.now)
        self._metrics.record(step or 0, values)
        if self._speaks:
            log.warning("%swarning: %s", f"step {step}: " if step else "", words)
