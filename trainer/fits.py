"""Whether a job fits what is known only at its start: the splits of its data, and the number of its steps.

A run that would stop at its first evaluation, or wait for what never comes, ends here.
"""

from collections.abc import Collection

from trainer.errors import InputError
from trainer.job import TrainJob


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
