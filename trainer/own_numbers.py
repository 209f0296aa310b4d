"""What a job's own numbers defeat, as far as it is known before the first step. Pure; both sides and `negpool run` ask.

Nothing here is an error: each may be meant, in a trial that is short, or on data that are few.
"""

import math

from trainer.data.sampler import steps_per_epoch
from trainer.job import TrainJob

KINDS = ("checkpoint_interval", "evaluation_interval", "patience", "per_query", "max_age")


def defeats(job: TrainJob, num_steps: int, num_passages: int) -> dict[str, str | None]:
    """Return a sentence for each kind of setting that cannot do what it is for, None where it can.

    num_steps: of the whole run. num_passages: of the corpus.
    """
    every, negatives, stop, evaluate = job.checkpoint.every_steps, job.negatives, job.stop, job.eval.every_steps
    per_query, max_age = negatives.per_query, negatives.max_age_steps
    is_mined = negatives.per_query != 0 and not negatives.schedule
    steps = f"the {num_steps} step{'s' * (num_steps != 1)} of this run"
    found: dict[str, str | None] = dict.fromkeys(KINDS)
    if every >= num_steps:
        effect = "nothing is mined from a model that has learnt anything" if is_mined else "a run that is killed begins anew"
        found["checkpoint_interval"] = f"checkpoint.every_steps={every} is not less than {steps}: {effect}; set it lower"
    if evaluate is not None and evaluate >= num_steps:
        until = f"there is no evaluation on {job.eval.dev_split} before the end"
        found["evaluation_interval"] = f"eval.every_steps={evaluate} is not less than {steps}: {until}; set it lower"
    elif evaluate is not None and stop.patience is not None and (stop.patience + 1) * evaluate >= num_steps:
        found["patience"] = (
            f"stop.patience={stop.patience} ends nothing: with eval.every_steps={evaluate} it takes as long as {steps}; "
            "set one of them lower"
        )
    if isinstance(per_query, int) and per_query >= num_passages:
        found["per_query"] = f"negatives.per_query={per_query} is not less than the corpus' {num_passages} passages; set it lower"
    if is_mined and max_age is not None and max_age < every:
        found["max_age"] = (
            f"negatives.max_age_steps={max_age} is less than checkpoint.every_steps={every}: negatives are too old before there "
            "are younger ones; set it higher, or checkpoint.every_steps lower"
        )
    return found


def planned_steps(job: TrainJob, num_queries: int) -> int | None:
    """Return how many steps a job takes over so many training queries; None where sources make batches of their own."""
    if job.optim.steps is not None:
        return job.optim.steps
    if job.batch.mode != "mixed":
        return None
    return max(1, math.ceil(job.optim.epochs * steps_per_epoch(num_queries, job.batch.queries)))
