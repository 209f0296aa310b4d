"""What a plan says of a job that is about to be submitted: refusals of what is certain, and warnings of what is foreseen."""

from typing import Any

from launch.jobfile import Jobs
from trainer.errors import InputError


def refuse_impossible(jobs: Jobs, num_ranks: int) -> None:
    """Raise InputError for a job that no machine can run on so many ranks; reads neither data nor model."""
    train = jobs.train
    batches = {"batch.queries": train.batch.queries}
    if train.batch.mode != "mixed":
        batches |= {f"sources.{name}.batch": source.batch for name, source in train.sources.items() if source.batch}
    for setting, queries in batches.items():
        if queries < num_ranks:
            raise InputError(
                f"{setting}={queries} is less than the {num_ranks} ranks; every rank needs a query, so set {setting} higher or "
                "take fewer ranks"
            )


def foresee_submission(jobs: Jobs, num_ranks: int, save_seconds: int, device: str, fabric: str | None) -> dict[str, Any]:
    """Return the plan of a job on the ranks that are submitted, with what will not go well under `warnings`."""
    from launch.plan.plan_job import PlanRequest, plan_job

    found = plan_job(jobs, PlanRequest(ranks=(num_ranks,), device=device, fabric=fabric))
    row = found["sizes"][0]
    warnings = [f"{problem}; submitted all the same" for problem in row["problems"]]
    needed = row["storage"]["save_seconds"]
    if needed > save_seconds:
        warnings.append(
            f"a checkpoint of {row['storage']['checkpoint_bytes'] / 2**30:.1f} GiB may take longer than --save-seconds "
            f"{save_seconds} leaves; set it to {needed} or more"
        )
    return found | {"warnings": warnings}


def submission_words(found: dict[str, Any]) -> str:
    """Return the plan in a sentence."""
    row = found["sizes"][0]
    return (
        f"Planned on {found['device']['name']}: {row['step_s']:.3g} s a step, most of it {row['bottleneck']}; "
        f"{row['memory_total_gib']:.1f} of {row['memory_limit_gib']:.1f} GiB of a rank."
    )
