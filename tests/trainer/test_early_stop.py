"""Decisions on made-up evaluations: when a run ends, which negatives go back, and that a restart changes neither."""

import json
import typing

import pytest
from pydantic import ValidationError

from trainer.early_stop import EarlyStop, Fall, Measure, RollBack, StopSettings
from trainer.evaluate import MEASURES


def stops(values, **settings):
    """Return what each evaluation decides."""
    early = EarlyStop(StopSettings(**settings))
    return [early.observe(10 * i, {"ndcg@10": value}) for i, value in enumerate(values)]


def test_a_run_ends_after_so_many_evaluations_in_a_row_without_a_gain():
    assert stops([0.3, 0.5, 0.4, 0.5], patience=2) == [False, False, False, True]
    assert stops([0.3, 0.2, 0.4, 0.3, 0.3], patience=2) == [False, False, False, False, True]


def test_a_gain_has_to_be_large_enough():
    slowly = [0.30, 0.305, 0.31, 0.315]
    assert stops(slowly, patience=1) == [False] * 4
    assert stops(slowly, patience=1, min_gain=0.02) == [False, True, True, True]
    # Small gains add up against the best, not against the last.
    assert stops([0.30, 0.31, 0.325], patience=2, min_gain=0.02) == [False, False, False]


def test_without_patience_nothing_ends_and_nan_is_no_gain():
    assert not any(stops([0.5, 0.4, 0.3, 0.2]))
    assert stops([0.5, float("nan"), float("nan")], patience=2) == [False, False, True]
    assert stops([float("nan"), 0.1, 0.2], patience=2) == [False, False, False]


def test_an_evaluation_made_again_counts_once():
    early = EarlyStop(StopSettings(patience=2))
    for step, value in [(0, 0.5), (10, 0.4), (10, 0.4), (0, 0.5), (10, 0.4)]:
        assert not early.observe(step, {"ndcg@10": value})
    assert early.observe(20, {"ndcg@10": 0.4})


def test_another_measure_decides_where_it_is_named():
    early = EarlyStop(StopSettings(patience=1, measure="mrr@10"))
    assert not early.observe(0, {"mrr@10": 0.5, "ndcg@10": 0.9})
    assert early.observe(1, {"mrr@10": 0.4, "ndcg@10": 1.0})
    assert (early.best, early.best_step) == (0.5, 0)


def falls(evaluations, max_fall=0.05):
    """Return what each (version, value) takes back."""
    roll_back = RollBack(StopSettings(max_fall=max_fall))
    return [roll_back.observe(version, {"ndcg@10": value}) for version, value in evaluations]


def test_negatives_that_made_dev_fall_go_back_to_those_before():
    assert falls([(0, 0.50), (1, 0.40)]) == [None, Fall(1, 0, 0.50, 0.40)]
    assert falls([(0, 0.50), (1, 0.46)]) == [None, None], "within what is allowed"
    assert falls([(None, 0.50), (0, 0.40)])[1] == Fall(0, None, 0.50, 0.40)


def test_a_fall_is_measured_from_the_last_evaluation_before_the_swap():
    assert falls([(0, 0.60), (0, 0.50), (1, 0.47)])[2] is None
    assert falls([(0, 0.50), (1, 0.48), (1, 0.44)])[2] == Fall(1, 0, 0.50, 0.44), "slowly, under the same negatives"
    assert falls([(0, 0.50), (1, 0.47), (2, 0.43)])[2] is None, "each swap by itself"
    assert falls([(0, 0.50), (3, 0.40)])[1].back_to == 0, "versions that came and went unseen"


def test_without_a_swap_or_a_limit_nothing_goes_back():
    assert falls([(2, 0.9), (2, 0.1), (2, 0.05)]) == [None] * 3
    assert falls([(0, 0.9), (1, 0.1)], max_fall=None) == [None] * 2


def test_after_going_back_the_older_negatives_are_compared_with_themselves():
    roll_back = RollBack(StopSettings(max_fall=0.05))
    found = [roll_back.observe(v, {"ndcg@10": x}) for v, x in [(0, 0.5), (1, 0.3), (0, 0.31), (2, 0.30), (3, float("nan"))]]
    assert [fall and (fall.version, fall.back_to) for fall in found] == [None, (1, 0), None, None, (3, 2)]
    assert roll_back.refused == [1, 3]


@pytest.mark.parametrize("cut", range(5))
def test_a_restart_anywhere_changes_no_decision(cut):
    settings = StopSettings(patience=2, max_fall=0.05)
    evaluations = [(0, 0.5), (0, 0.55), (1, 0.45), (0, 0.5), (2, 0.44)]

    def decide(restart_at):
        early, roll_back, found = EarlyStop(settings), RollBack(settings), []
        for i, (version, value) in enumerate(evaluations):
            if i == restart_at:
                kept = json.loads(json.dumps([early.state_dict(), roll_back.state_dict()]))
                early, roll_back = EarlyStop(settings), RollBack(settings)
                early.load_state_dict(kept[0])
                roll_back.load_state_dict(kept[1])
            measures = {"ndcg@10": value}
            found.append((early.observe(i, measures), roll_back.observe(version, measures)))
        return found, roll_back.refused

    assert decide(cut) == decide(None)
    assert decide(None)[1] == [1, 2] and decide(None)[0][3][0], "the decisions are not all no"


def test_every_measure_of_an_evaluation_may_decide_and_no_other():
    assert set(typing.get_args(Measure)) == MEASURES.keys()
    with pytest.raises(ValidationError, match="measure"):
        StopSettings(measure="map")
    assert not StopSettings().needs_evaluations and StopSettings(max_fall=0.1).needs_evaluations
