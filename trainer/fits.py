"""Whether a job fits what is known only at its start: the splits and sizes of its data, and the number of its steps.

A run that would stop at its first evaluation, or wait for what never comes, ends here.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from trainer.errors import InputError
from trainer.job import TrainJob

if TYPE_CHECKING:  # importing it takes a second, which `check_early` should not pay
    from trainer.data.datasets import RetrievalData


def check_splits(job: TrainJob, splits: Collection[str], data: object) -> None:
    """Raise InputError for a split that the run needs and its data does not have; splits: those that `data` has."""
    needed = {"data.train_split": job.data.train_split}
    if job.eval.every_steps is not None:
        needed["eval.dev_split"] = job.eval.dev_split
    for setting, split in needed.items():
        if split not in splits:
            there = ", ".join(sorted(splits)) or "none"
            instead = "" if setting == "data.train_split" else ", or leave eval.every_steps out"
            raise InputError(f"{setting}={split!r} is no split of {data}, which has {there}; set it to one of them{instead}")


def check_steps(job: TrainJob, num_steps: int) -> None:
    """Raise InputError for what is to happen behind the last step; num_steps: of the whole run."""
    every = job.eval.every_steps
    if job.stop.needs_evaluations and every is not None and every >= num_steps:
        raise InputError(
            f"section stop decides by evaluations on dev, every {every} steps, and the run has {num_steps}; "
            f"set eval.every_steps below {num_steps}"
        )
    late = [entry.step for entry in job.negatives.schedule if entry.step >= num_steps]
    if late:
        raise InputError(
            f"negatives.schedule has a swap at step {late[0]}, and the run ends with step {num_steps}; "
            f"take it out, or set optim.steps above {late[-1]}"
        )


def check_sizes(job: TrainJob, data: "RetrievalData", num_ranks: int) -> None:
    """Raise InputError where the data, the batches and the ranks do not fit together, or a split to decide by is missing."""
    check_splits(job, data.qrels, data.path)
    rows = data.training_queries(job.data.train_split)
    batches = [("batch.queries", job.batch.queries, data.path, len(rows))]
    if job.batch.mode != "mixed":
        counts = np.bincount(data.source_of("queries", rows), minlength=len(data.sources)).tolist()
        batches = [
            (f"sources.{s.name}.batch", s.settings.batch, s.settings.path, count) if s.settings.batch
            else ("batch.queries", job.batch.queries, s.settings.path, count)
            for s, count in zip(data.sources, counts, strict=True)
        ]  # fmt: skip
    for name, batch, path, num_queries in batches:
        if batch < num_ranks:
            raise InputError(
                f"{name}={batch} is less than the {num_ranks} ranks; every rank needs a query, "
                f"so set {name} higher or launch fewer ranks"
            )
        if num_queries < batch:
            raise InputError(f"{path} has {num_queries} training queries, fewer than {name}={batch}; set {name} lower")
