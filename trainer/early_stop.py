"""When a dev measure says that a run is done, or that its newest negatives have hurt.

Pure bookkeeping: evaluations come in, decisions go out, and what they depend on survives a restart. All ranks see the same
measures, so all decide alike.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import PositiveInt

from trainer.ranges import Rate, job_section

Measure = Literal["ndcg@10", "mrr@10", "recall@10", "recall@100"]  # all that an evaluation has


@job_section
class StopSettings:
    """Section `stop`: what evaluations on dev decide."""

    measure: Measure = "ndcg@10"
    """Measure of the dev evaluation that decides, and of the verdict at the end; more is better."""
    patience: PositiveInt | None = None
    """Evaluations in a row without a gain before the run ends; None: never."""
    min_gain: Rate = 0.0
    """Over the best so far, below which an evaluation is no gain."""
    max_fall: Rate | None = None
    """Since the negatives were last swapped, beyond which they are taken back; None: never."""

    @property
    def needs_evaluations(self) -> bool:
        """Whether anything is to be decided."""
        return self.patience is not None or self.max_fall is not None


class EarlyStop:
    """Counts evaluations since the best one."""

    def __init__(self, settings: StopSettings):
        self._settings = settings
        self.best: float | None = None  # whatever the gain: its checkpoint is the best one
        self.reference: float | None = None  # what the next gain is measured from
        self.best_step: int | None = None
        self.last_step: int | None = None
        self.num_without_gain = 0

    def observe(self, step: int, measures: Mapping[str, float]) -> bool:
        """Take in an evaluation; return whether the run should end. One made again, after a restart, does not count."""
        if self.last_step is not None and step <= self.last_step:
            return self.is_over
        self.last_step = step
        value = measures[self._settings.measure]
        if not math.isnan(value) and (self.best is None or value > self.best):
            self.best, self.best_step = value, step
        if not math.isnan(value) and (self.reference is None or value > self.reference + self._settings.min_gain):
            self.reference, self.num_without_gain = value, 0
        else:
            self.num_without_gain += 1
        return self.is_over

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self._settings.patience is not None and self.num_without_gain >= self._settings.patience

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {key: getattr(self, key) for key in ("best", "reference", "best_step", "last_step", "num_without_gain")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        known = {"reference": state["best"], **state}  # older checkpoints have no reference
        for key in self.state_dict():
            setattr(self, key, known[key])


@dataclass(frozen=True)
class Fall:
    """Negatives that made a measure fall too far."""

    version: int | None  # that did
    back_to: int | None  # in force at the last evaluation before it; None: no mined negatives
    before: float
    after: float


class RollBack:
    """Compares each evaluation with the last one under other negatives than those in force."""

    def __init__(self, settings: StopSettings):
        self._settings = settings
        self._before: _Seen | None = None  # the last evaluation under the negatives of before the swap
        self._last: _Seen | None = None
        self.refused: list[int | None] = []  # versions taken back, never to come into force again

    def observe(self, version: int | None, measures: Mapping[str, float]) -> Fall | None:
        """Take in an evaluation under a version of the negatives; return what has to be taken back, if anything.

        Afterwards the version it names is taken to be in force, and the one it refuses as never seen.
        """
        seen = _Seen(version, measures[self._settings.measure])
        if self._last is not None and self._last.version != version:
            self._before = self._last
        self._last = seen
        if self._before is None or self._settings.max_fall is None or not self._has_fallen(seen):
            return None
        fall = Fall(version, self._before.version, self._before.value, seen.value)
        self.refused.append(version)
        self._last, self._before = self._before, None
        return fall

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        parts = {name: None if seen is None else asdict(seen) for name, seen in (("before", self._before), ("last", self._last))}
        return {**parts, "refused": list(self.refused)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._before, self._last = (None if state[name] is None else _Seen(**state[name]) for name in ("before", "last"))
        self.refused = list(state["refused"])

    def _has_fallen(self, seen: "_Seen") -> bool:
        assert self._before is not None and self._settings.max_fall is not None
        # A measure that is not a number has fallen as far as can be.
        return math.isnan(seen.value) or self._before.value - seen.value > self._settings.max_fall


@dataclass(frozen=True)
class _Seen:
    """One evaluation."""

    version: int | None
    value: float
