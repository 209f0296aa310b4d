"""From a job's settings to the loss of a task: a setting goes the whole way by its name."""

from dataclasses import dataclass, replace

import pytest
import torch

import trainer.tasks
from gradcache import InfoNCE, LossOptions
from trainer.job import PrecisionSettings
from trainer.loss_settings import LossSettings
from trainer.ranges import job_section
from trainer.tasks import loss_options

FLOAT32 = PrecisionSettings(products="fp32")

GIVEN = {
    "symmetric": True,
    "same_side": True,
    "gather": "queries",
    "keep_scores_gib": 0.5,
    "tile_rows": 7,
    "widths": (8, 4),
    "width_weights": (1.0, 2.0),
}


@pytest.mark.parametrize(("name", "value"), GIVEN.items())
def test_a_setting_of_the_job_is_an_option_of_the_loss(name, value):
    given = {"widths": (8, 4), name: value}  # weights need widths
    found = loss_options(LossSettings(**given), FLOAT32)
    assert type(found.objective) is InfoNCE and vars(found.objective) == vars(InfoNCE())
    assert found == replace(LossOptions(objective=found.objective, product_dtype=torch.float32), **given)


def test_the_objective_and_the_products_are_found_by_their_names():
    found = loss_options(LossSettings(parameters={"positives": "mean"}), PrecisionSettings(products="bf16"))
    assert type(found.objective) is InfoNCE and vars(found.objective) == vars(InfoNCE(positives="mean"))
    assert found == LossOptions(objective=found.objective, product_dtype=torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class MoreOptions(LossOptions):
    sharpness: float = 1.0


@job_section
class MoreSettings(LossSettings):
    """Section `loss`, with one setting more."""

    sharpness: float = 1.0
    """As an objective of tomorrow may want it."""


def test_a_new_setting_needs_the_job_and_the_objective_alone(monkeypatch):
    monkeypatch.setattr(trainer.tasks, "LossOptions", MoreOptions)
    assert loss_options(MoreSettings(sharpness=3.0), FLOAT32).sharpness == 3.0  # type: ignore[attr-defined]
    assert loss_options(LossSettings(), FLOAT32).sharpness == 1.0  # type: ignore[attr-defined]
