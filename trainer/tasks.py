"""The tasks of a step: which of a step's queries share a loss, which loss that is, and what it weighs in the update."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import nn

from gradcache import LossOptions, Objective, StepResult, Temperature
from gradcache.step import Later, Measured
from trainer.data.collate import TrainingSet
from trainer.data.datasets import RetrievalData
from trainer.errors import InputError
from trainer.job import TrainJob
from trainer.loss_settings import LossSettings
from trainer.precision import PrecisionSettings, product_dtype

SUMMED = ("num_queries", "num_passages", "num_chunks", "num_halved", "num_tokens", "num_padded_tokens", "num_squared_tokens")
SECONDS = ("encode_s", "loss_s", "backward_s")


@dataclass(frozen=True)
class Task:
    """How the queries of one source, or of all, become a loss."""

    loss: LossOptions
    temperature: Temperature
    weight: float  # of its loss in the update


def build_objectives(job: TrainJob, device: torch.device) -> dict[str, Objective]:
    """Return the job's objective as "loss", and as "sources.NAME" that of each source which has its own."""
    found = {"loss": job.loss.build_objective()}
    own = {name: source for name, source in job.sources.items() if source.objective is not None}
    found |= {f"sources.{name}": job.loss.objective_of(name, source) for name, source in own.items()}
    for objective in found.values():
        if isinstance(objective, nn.Module):
            objective.to(device)
    return found


def loss_options(settings: LossSettings, precision: PrecisionSettings, objective: Objective | None = None) -> LossOptions:
    """Return a job's section as what the mathematics reads: each of its options that the section has, under the same name.

    objective: the section's, where it is there already.
    """
    given = {field.name: getattr(settings, field.name) for field in fields(LossOptions) if hasattr(settings, field.name)}
    made = {
        "objective": objective or settings.build_objective(),
        "false_negatives": settings.limits,
        "product_dtype": product_dtype(precision),
    }
    return LossOptions(**{**given, **made})


def build_tasks(
    options: LossOptions, data: RetrievalData, temperature: Temperature, objectives: Mapping[str, Objective]
) -> dict[int | None, Task]:
    """Return the task of each source by its number, and of mixed queries under None.

    temperature: the run's own, of all that have none of their own. objectives: as `build_objectives` has them.
    """
    device = temperature.log_scale.device
    tasks: dict[int | None, Task] = {None: Task(options, temperature, 1.0)}
    for number, source in enumerate(data.sources):
        own = source.settings
        tasks[number] = Task(
            replace(options, objective=objectives.get(f"sources.{source.name}", options.objective)),
            temperature if own.temperature is None else Temperature(own.temperature).to(device),
            own.loss_weight,
        )
    return tasks


def check_grades(job: TrainJob, data: RetrievalData, dataset: TrainingSet, tasks: Mapping[int | None, Task]) -> None:
    """Raise InputError where an objective orders pairs by grades that are all one."""
    of_source = data.source_of("queries", data.training_queries(job.data.train_split))
    numbers: Sequence[int | None] = range(len(data.sources)) if job.sources and job.batch.mode != "mixed" else [None]
    for number in numbers:
        if "grade" not in tasks[number].loss.objective.row_values:
            continue
        is_own = np.full(dataset.num_queries, True) if number is None else of_source == number
        grades = dataset.positive_grades[np.repeat(is_own, np.diff(dataset.positive_indptr))]
        if len(grades) and grades.min() == grades.max():
            where, name = "loss", job.loss.objective
            if number is not None and (own := data.sources[number].settings.objective) is not None:
                where, name = f"sources.{data.sources[number].name}", own
            raise InputError(
                f"{where}.objective={name!r} orders pairs by their grades, and all {len(grades):,} pairs have grade "
                f"{grades[0]:g}; expected grades that differ, as scores in qrels"
            )


def joined(results: Sequence[StepResult], weights: Sequence[float]) -> StepResult:
    """Return what a step of several tasks found: the weighted sum of their losses, the sums of all else. Waits for no device."""
    sums = {name: sum(getattr(result, name) for result in results) for name in SUMMED}
    padded = max(1, sums["num_padded_tokens"])
    return StepResult(
        share_encoded_twice=sum(r.share_encoded_twice * r.num_padded_tokens for r in results) / padded,
        spread=max((r.spread for r in results if r.spread is not None), default=None),
        way=results[0].way,
        measured=Later(lambda: _measured([result.measured() for result in results], weights)),
        **sums,
    )


def _measured(found: Sequence[Measured], weights: Sequence[float]) -> Measured:
    return Measured(
        loss=sum(each.loss * weight for each, weight in zip(found, weights, strict=True)),
        share_masked=sum(each.share_masked for each in found) / len(found),  # tasks' batches are of one size, more or less
        **{name: sum(getattr(each, name) for each in found) for name in SECONDS},
    )
