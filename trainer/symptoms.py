"""Signs that training goes wrong, from figures that a step or an evaluation has anyway.

Pure bookkeeping: figures come in, sentences go out, None where all is well.
"""

import collections
import math
import statistics
from collections.abc import Mapping
from typing import Any

from trainer.collapse import STEPS

WINDOW = 100  # gradients whose median is the usual one: long enough for batches that differ, short enough to follow a schedule
FEWEST = 10  # of them before any is called too large for the usual ones; the first gradients are seldom too small
VANISHED = 1e-3  # of the median: MiniLM on code stays above a fifth of it, and a collapse goes far below
EXPLODED = 10.0  # times the median: MiniLM on code stays within 2, random encoders are not beyond 10 for so many steps in a row
NARROW = 1 / 4  # of the widest spread or of the untrained model's rank: half-way, in logarithms, to what ends a run is a fifth
LOST = 1 / 4  # of what training had gained at its best: less comes and goes between evaluations


class Lasting:
    """Becomes true when something is so for STEPS steps in a row, and false when it is not so for as many."""

    def __init__(self) -> None:
        self.holds = False
        self._num_against = 0

    def observe(self, is_so: bool) -> bool:
        """Take in a step and return whether it lasts."""
        self._num_against = self._num_against + 1 if is_so != self.holds else 0
        if self._num_against == STEPS:
            self.holds, self._num_against = is_so, 0
        return self.holds


class Gradients:
    """Compares each gradient's norm with the median of those before it that were usual."""

    def __init__(self) -> None:
        self._usual: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._vanished, self._exploded = Lasting(), Lasting()

    def observe(self, norm: float) -> dict[str, str | None]:
        """Take in a step's norm, before clipping; return a sentence for each kind of warning. NaN and infinity say nothing."""
        if math.isfinite(norm):
            median = statistics.median(self._usual) if self._usual else None
            is_small = norm == 0 or (median is not None and norm < VANISHED * median)
            is_large = median is not None and len(self._usual) >= FEWEST and norm > EXPLODED * median
            if not (is_small or is_large):
                self._usual.append(norm)
            self._vanished.observe(is_small)
            self._exploded.observe(is_large)
        usual = f", where {statistics.median(self._usual):.3g} was usual" if self._usual else ""
        small = f"the gradient is nearly zero for {STEPS} steps and more, {norm:.3g} now{usual}; nothing is learnt"
        large = f"the gradient is very large for {STEPS} steps and more, {norm:.3g} now{usual}; set a lower optim.lr"
        return {
            "gradient_zero": small if self._vanished.holds else None,
            "gradient_explodes": large if self._exploded.holds else None,
        }


def narrowing(spread: float, widest: float) -> str:
    """Return the sentence of embeddings that come together; spread, widest: 1 - the mean cosine of a step, and at its largest."""
    return (
        f"embeddings come together: their mean cosine is {1 - spread:.3f}, and {1 - widest:.3f} where they were furthest apart; "
        "the model may be about to collapse: set a lower optim.lr"
    )


def shape_of(health: Mapping[str, Any]) -> dict[str, float]:
    """Return how wide embeddings of an evaluation are, of its wider side: a side may have a single text."""
    found = {}
    for name in ("spread", "effective_rank"):
        values = [float(value) for key, value in health.items() if key.startswith(f"health/{name}/")]
        if values:
            found[name] = max(values)
    return found


def rank_lost(shape: Mapping[str, float], untrained: Mapping[str, float]) -> str | None:
    """Return a sentence where evaluated embeddings use far fewer dimensions than the untrained model's; see `shape_of`."""
    now, before = shape.get("effective_rank"), untrained.get("effective_rank")
    if now is None or before is None or now >= NARROW * before:
        return None
    return (
        f"evaluated embeddings use {now:.1f} dimensions, and the untrained model's used {before:.1f} (effective rank); "
        "the model may be about to collapse: set a lower optim.lr"
    )


def has_lost(value: float, best: float, untrained: float) -> bool:
    """Tell whether a measure is well below its best: a good part of the gain over the untrained model is gone."""
    return best > untrained and value < best - LOST * (best - untrained)
