"""Each sign of trouble begins when it lasts, ends when it is over, and keeps silent over what healthy runs do."""

import json
import logging

import numpy as np
import pytest

from trainer.collapse import STEPS
from trainer.metrics import MetricsFile, NoMetrics, NoStatus, Status, read_status
from trainer.symptoms import FEWEST, Gradients, Lasting, has_lost, rank_lost, shape_of
from trainer.warned import Warnings


def kinds_of(norms):
    """Return at which norms each kind of warning stands."""
    gradients, found = Gradients(), {}
    for place, norm in enumerate(norms):
        for kind, sentence in gradients.observe(norm).items():
            if sentence is not None:
                found.setdefault(kind, []).append(place)
    return found


USUAL = list(np.random.default_rng(0).lognormal(0, 0.5, 40))


@pytest.mark.parametrize("kind, odd", [("gradient_zero", 0.0), ("gradient_zero", 1e-5), ("gradient_explodes", 80.0)])
def test_gradients_that_stay_far_from_the_usual_are_said_until_they_are_usual_again(kind, odd):
    found = kinds_of([*USUAL, *[odd] * 20, *USUAL])
    begin, end = len(USUAL) + STEPS - 1, len(USUAL) + 20 + STEPS - 1
    assert found == {kind: list(range(begin, end))}


def test_single_steps_schedules_and_what_is_not_finite_are_no_trouble():
    assert kinds_of([*USUAL, 100.0, 1e-6, *USUAL]) == {}
    assert kinds_of(np.geomspace(10, 1e-4, 1500)) == {}, "a loss that falls without an end"
    assert kinds_of(np.geomspace(1e-3, 10, 1500)) == {}, "the same upwards, as behind a long warm-up"
    assert kinds_of([*USUAL, *[float("nan")] * 20, *[float("inf")] * 20]) == {}, "counted elsewhere"
    assert kinds_of([1.0] * (FEWEST - 1) + [50.0] * STEPS) == {}, "too early to know what is usual"


def test_a_gradient_of_zero_needs_no_usual_one():
    assert kinds_of([2.0, *[0.0] * STEPS])["gradient_zero"] == [STEPS]


def test_what_comes_and_goes_does_not_last():
    lasting = Lasting()
    assert not any(lasting.observe(step % 2 == 0) for step in range(50))
    assert [lasting.observe(True) for _ in range(STEPS)][-1]
    assert all(lasting.observe(step % 2 == 0) for step in range(50)), "nor is it over at once"


def test_a_rank_is_lost_against_the_untrained_models_of_the_wider_side():
    health = {"health/effective_rank/queries": 1.0, "health/effective_rank/passages": 20.0, "health/spread/passages": 0.5}
    assert shape_of(health) == {"effective_rank": 20.0, "spread": 0.5}
    assert rank_lost({"effective_rank": 4.9}, shape_of(health)) is not None
    assert rank_lost({"effective_rank": 5.1}, shape_of(health)) is None
    assert rank_lost({}, shape_of(health)) is rank_lost(shape_of(health), {}) is None


def test_a_fall_is_measured_by_what_training_had_gained():
    assert has_lost(0.57, best=0.60, untrained=0.50) and not has_lost(0.58, best=0.60, untrained=0.50)
    assert not has_lost(0.40, best=0.50, untrained=0.50), "nothing was gained, and another warning says the rest"


def test_a_warning_is_told_once_wherever_people_look_and_taken_back_once(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    status = Status(tmp_path, "trainer", min_interval_s=0)
    metrics = MetricsFile(tmp_path / "logs" / "metrics.jsonl")
    warnings = Warnings(status, metrics)
    warnings.tell("odd", None, 1)
    assert caplog.text == "" and "warnings" not in read_status(tmp_path, "trainer")
    warnings.tell("odd", "it is odd.", 3)
    warnings.tell("late", "it is late.", None)
    warnings.tell("odd", "it is very odd.", 4)
    status.flush()
    assert read_status(tmp_path, "trainer")["warnings"] == [
        {"kind": "odd", "sentence": "it is very odd.", "step": 3},
        {"kind": "late", "sentence": "it is late.", "step": None},
    ]
    warnings.tell("odd", None, 5)
    warnings.tell("odd", None, 6)
    status.flush()
    assert [warning["kind"] for warning in read_status(tmp_path, "trainer")["warnings"]] == ["late"]
    lines = map(json.loads, (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines())
    assert [(line["step"], line["event"], line["kind"]) for line in lines] == [
        (3, "warning", "odd"),
        (0, "warning", "late"),
        (5, "warning over", "odd"),
    ]
    said = ["step 3: warning: it is odd.", "warning: it is late.", "step 5: warning: over: it is very odd."]
    assert [record.getMessage() for record in caplog.records] == said


def test_a_rank_that_does_not_speak_keeps_silent(caplog):
    Warnings(NoStatus(), NoMetrics()).tell("odd", "it is odd.", 3)
    assert caplog.text == ""
