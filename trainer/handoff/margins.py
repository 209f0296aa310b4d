"""How far below a positive a negative must score: the miner's rule, and the trainer's where it depends on the positive drawn.

Both compare the same published float32 numbers, so what one keeps the other does not see otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trainer.handoff.settings import Margin, Which


@dataclass(frozen=True, kw_only=True)
class Margins:
    """The margins of a version, as its manifest has them: those of section `filter`, and rerank.margin."""

    positive: Which  # of a query's positives, the one that decides; each: a negative need only be below one of them
    relative_margin: Margin
    absolute_margin: Margin
    adaptive_margin: tuple[float, float] | Literal["off"]
    teacher_margin: Margin

    @classmethod
    def of_each(cls, manifest: dict[str, Any]) -> "Margins | None":
        """Return those that hold for the positive drawn; None: the miner has held all negatives to one positive."""
        fields = manifest.get("margins")
        return cls(**fields) if fields and fields.get("positive") == "each" else None

    def ceilings(self, positive_scores: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each margin's name and the score that the negatives of a positive must stay below, of any shape, float32."""
        if self.relative_margin != "off":
            yield "relative_margin", ceiling(positive_scores, 0, self.relative_margin)
        if self.absolute_margin != "off":
            yield "absolute_margin", ceiling(positive_scores, self.absolute_margin, 0)
        if self.adaptive_margin != "off":
            yield "adaptive_margin", ceiling(positive_scores, *self.adaptive_margin)

    def admit(
        self,
        scores: np.ndarray,
        positive_scores: np.ndarray,
        teacher_scores: np.ndarray | None = None,
        positive_teacher_scores: np.ndarray | None = None,
    ) -> np.ndarray:
        """Tell which negatives are below all margins of a positive; shapes broadcast. teacher: needed for `teacher_margin`."""
        is_below = np.ones(np.broadcast_shapes(scores.shape, positive_scores.shape), bool)
        for _, most in self.ceilings(positive_scores):
            is_below &= scores < most
        if self.teacher_margin != "off":
            assert teacher_scores is not None and positive_teacher_scores is not None
            is_below &= teacher_scores < ceiling(positive_teacher_scores, self.teacher_margin, 0)
        return is_below


def ceiling(positive_scores: np.ndarray, absolute: float, relative: float) -> np.ndarray:
    """Return s_pos - (absolute + relative * |s_pos|): below s_pos for margins above 0, whatever the sign of s_pos."""
    return positive_scores - (np.float32(absolute) + np.abs(positive_scores) * np.float32(relative))
