"""What evaluations of a run found, one file each: `evaluations/NAME.json`, the measures and those of each query.

Names: untrained, trained and last on the split that is tested; dev/untrained and dev/best on the one that decides.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainer.evaluate import MEASURES
from trainer.handoff.manifest import write_atomically

TESTED = ("untrained", "trained", "last")
DECIMALS = 5  # of a query's measure: a file of 100,000 queries has some 3 MB


@dataclass(frozen=True)
class Scores:
    """One evaluation."""

    step: int  # of the weights
    split: str
    measures: dict[str, float]
    each_QM: np.ndarray | None = None  # of each query, columns as in MEASURES; None: unknown, or not on this rank
    shape: dict[str, float] = field(default_factory=dict)  # of the embeddings, see `shape_of`

    def of_each(self, measure: str) -> np.ndarray | None:
        """Return a measure of each query, (Q,), where it is known."""
        return None if self.each_QM is None else self.each_QM[:, list(MEASURES).index(measure)]


def write_scores(run: Path, name: str, scores: Scores) -> None:
    """Keep an evaluation in place of an earlier one of that name. Raises as `write_atomically`."""
    columns = [] if scores.each_QM is None else scores.each_QM.T.round(DECIMALS).tolist()
    each = dict(zip(MEASURES, columns, strict=False))
    about = {"step": scores.step, "split": scores.split, **scores.measures, "shape": scores.shape, "each": each}
    write_atomically(_file(run, name), json.dumps(about))


def read_scores(run: Path, name: str) -> Scores | None:
    """Return an evaluation that was kept, or None. Runs of older versions kept no measures of each query."""
    try:
        kept = json.loads(_file(run, name).read_text())
    except FileNotFoundError:
        return None
    each = [kept.get("each", {}).get(measure) for measure in MEASURES]
    each_QM = None if None in each else np.array(each).T
    measures = {measure: kept[measure] for measure in MEASURES if measure in kept}
    return Scores(kept["step"], kept["split"], measures, each_QM, kept.get("shape", {}))


def forget_scores(run: Path, name: str) -> None:
    """Delete an evaluation that no longer holds."""
    _file(run, name).unlink(missing_ok=True)


def _file(run: Path, name: str) -> Path:
    return run / "evaluations" / f"{name}.json"
