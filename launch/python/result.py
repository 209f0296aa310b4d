"""What `negpool.train` returns: figures, paths, and the model."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from launch.output import measures_table
from launch.python.in_memory import PathLike
from launch.python.reading import load
from launch.python.rendered import as_html, as_text
from trainer.errors import InputError
from trainer.handoff.weights import checkpoint_name, checkpoints_folder, newest_checkpoint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ROWS = ("bm25", "untrained", "trained", "last")


@dataclass(frozen=True)
class RunVerdict:
    """What negpool thinks of a run."""

    level: str  # better, unclear, worse or collapsed
    sentence: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class TrainResult:
    """A finished run."""

    run: Path
    """The run's folder, which every command takes."""
    model_folder: Path
    """The trained model, which SentenceTransformer and AutoModel load."""
    metrics: dict[str, dict[str, float]]
    """nDCG@10, MRR@10 and recall by row: "bm25", "untrained", "trained", and "last" where the last step is not the best one."""
    num_queries: int
    """Test queries behind the metrics."""
    versions_swapped: int
    """Versions of mined negatives that training used."""
    seconds: float
    """Of all starts of the run."""
    verdict: RunVerdict | None = None
    intervals: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """The 95 % intervals of the metrics over the test queries, by row and by difference, as "trained - untrained"."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """What the evaluator that was given returned of the trained model."""

    @classmethod
    def read(cls, run: PathLike, evaluation: dict[str, float] | None = None) -> "TrainResult":
        """Return the result of a run that has finished, by its folder; raises InputError for any other."""
        run = Path(run).absolute()  # whatever the working folder is later
        try:
            kept = json.loads((run / "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{run} has no results; expected the folder of a run that has finished") from error
        return cls(
            run,
            _model_folder(run, kept),
            {name: kept[name] for name in ROWS if name in kept},
            kept["num_test_queries"],
            kept["versions_swapped"],
            kept["seconds"],
            _verdict(kept),
            kept.get("intervals") or {},
            evaluation or {},
        )

    def model(self) -> "SentenceTransformer":
        """Return the trained model."""
        return load(self.model_folder)

    def __repr__(self) -> str:
        """Return the table of the run and what comes of it."""
        return as_text(list(self._parts()))

    def _repr_html_(self) -> str:
        return as_html(list(self._parts()))

    def _parts(self) -> Iterator[RenderableType]:
        if self.metrics:
            yield measures_table(self.metrics, f"{self.num_queries:,} test queries")
        if self.verdict is not None:
            yield self.verdict.sentence
        yield from (f"{name}: {value:.4f}" for name, value in self.evaluation.items())
        yield f"The model: {self.model_folder}"


def _model_folder(run: Path, kept: dict[str, Any]) -> Path:
    """Return the folder of the model that is called trained: the best one, where a run names it, else the last one."""
    step = (kept.get("steps") or {}).get("trained")
    if step is not None and (best := checkpoints_folder(run) / checkpoint_name(step) / "encoder").is_dir():
        return best
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise InputError(f"{run} has no whole checkpoint; its model was deleted")
    return checkpoint.encoder_folder


def _verdict(kept: dict[str, Any]) -> RunVerdict | None:
    found = kept.get("verdict")
    if not found:
        return None
    return RunVerdict(found["level"], found["sentence"], tuple(warning["sentence"] for warning in found.get("warnings", ())))
