"""The tasks of a step: which of a step's queries share a loss, which loss that is, and what it weighs in the update."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from gradcache import LossOptions, StepResult, Temperature
from gradcache.step import Later, Measured
from trainer.data.datasets import RetrievalData
from trainer.loss_settings import LossSettings
from trainer.precision import PrecisionSettings, product_dtype

SUMMED = ("num_queries", "num_chunks", "num_halved", "num_tokens", "num_padded_tokens")
SECONDS = ("encode_s", "loss_s", "backward_s")


@dataclass(frozen=True)
class Task:
    """How the queries of one source, or of all, become a loss."""

    loss: LossOptions
    temperature: Temperature
    weight: float  # of its loss in the update


def loss_options(settings: LossSettings, precision: PrecisionSettings) -> LossOptions:
    """Return a job's section as what the mathematics reads: each of its options that the section has, under the same name."""
    given = {field.name: getattr(settings, field.name) for field in fields(LossOptions) if hasattr(settings, field.name)}
    made = {
        "objective": settings.build_objective(),
        "false_negatives": settings.limits,
        "product_dtype": product_dtype(precision),
    }
    return LossOptions(**{**given, **made})


def build_tasks(
    settings: LossSettings, options: LossOptions, data: RetrievalData, temperature: Temperature, device: torch.device
) -> dict[int | None, Task]:
    """Return the task of each source by its number, and of mixed queries under None.

    temperature: the run's own, of all that have none of their own.
    """
    tasks: dict[int | None, Task] = {None: Task(options, temperature, 1.0)}
    for number, source in enumerate(data.sources):
        own = source.settings
        tasks[number] = Task(
            options if own.objective is None else replace(options, objective=settings.objective_of(source.name, own)),
            temperature if own.temperature is None else Temperature(own.temperature).to(device),
            own.loss_weight,
        )
    return tasks


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
