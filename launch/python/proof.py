"""`negpool.check`: the proof that a job's gradients are exact."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launch.python.in_memory import Data, Model
from launch.python.rendered import as_html, as_text
from launch.python.whole_job import Job, JobLike


@dataclass(frozen=True, repr=False)
class Proof:
    """Gradients of cached steps beside those of one process and one graph."""

    ok: bool
    """Whether all agree."""
    max_ratio_error: float
    """How far the ratio of their norms is from 1, at worst."""
    min_cosine: float
    """Their cosine, at worst."""
    found: dict[str, Any]
    """Everything that `negpool check --json` prints."""

    def __repr__(self) -> str:
        """Return the tables that `negpool check` prints."""
        return as_text(self._parts())

    def _repr_html_(self) -> str:
        return as_html(self._parts())

    def _parts(self) -> list[Any]:
        from launch.tables import as_text as drawn
        from launch.tables import check_parts

        return [drawn(check_parts(self.found))]


def check(
    model: "Model | Mapping[str, Any] | None" = None,
    data: "Data | Mapping[str, Any] | None" = None,
    *,
    job: "JobLike | None" = None,
    ranks: int = 1,
    queries: int = 32,
    **settings: object,
) -> Proof:
    """Compare the gradients of a job's steps with one graph's, in processes of their own.

    model, data, job, settings: as `negpool.train` takes them. ranks: processes. queries: of the compared step.
    """
    from launch.check import check_job

    found = check_job(None, Job(model, data, job=job, **settings).overrides(), ranks, queries, in_children=True)
    return Proof(found["ok"], found["max_ratio_error"], found["min_cosine"], found)
