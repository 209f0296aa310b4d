"""What a job's own numbers defeat is said before the first step, and nothing of a job that can do what it says."""

from dataclasses import replace

import pytest

from trainer.early_stop import StopSettings
from trainer.handoff.settings import NegativesSettings, ScheduleEntry
from trainer.job import BatchSettings, CheckpointSettings, EvalSettings, OptimSettings, TrainJob
from trainer.own_numbers import defeats, planned_steps

SOUND = TrainJob(checkpoint=CheckpointSettings(every_steps=10), eval=EvalSettings(every_steps=10), stop=StopSettings(patience=3))


def said(job, num_steps=100, num_passages=1000):
    return {kind: sentence for kind, sentence in defeats(job, num_steps, num_passages).items() if sentence is not None}


@pytest.mark.parametrize(
    "kind, change, found",
    [
        ("checkpoint_interval", {"checkpoint": CheckpointSettings(every_steps=100)}, "checkpoint.every_steps=100 is not less"),
        ("evaluation_interval", {"eval": EvalSettings(every_steps=100)}, "eval.every_steps=100 is not less than the 100 steps"),
        ("patience", {"stop": StopSettings(patience=9)}, "stop.patience=9 ends nothing: with eval.every_steps=10"),
        ("per_query", {"negatives": NegativesSettings(per_query=1000)}, "not less than the corpus' 1000 passages"),
        ("max_age", {"negatives": NegativesSettings(max_age_steps=9)}, "max_age_steps=9 is less than checkpoint.every_steps=10"),
    ],
)
def test_each_number_that_defeats_the_job_is_named(kind, change, found):
    assert said(SOUND) == {}
    sentences = said(replace(SOUND, **change))
    assert list(sentences) == [kind] and found in sentences[kind]


def test_a_checkpoint_interval_of_the_run_matters_most_to_who_mines():
    job = replace(SOUND, checkpoint=CheckpointSettings(every_steps=200))
    assert "nothing is mined from a model that has learnt" in said(job)["checkpoint_interval"]
    alone = replace(job, negatives=NegativesSettings(per_query=0))
    assert "a run that is killed begins anew" in said(alone)["checkpoint_interval"]
    fixed = NegativesSettings(schedule=(ScheduleEntry(checkpoint=0, step=1),), max_age_steps=5)
    assert list(said(replace(SOUND, negatives=fixed))) == [], "a schedule says by itself when negatives come"


def test_steps_are_planned_as_the_trainer_counts_them():
    job = TrainJob(batch=BatchSettings(queries=32), optim=OptimSettings(epochs=1.5))
    assert planned_steps(job, 1469) == 69  # 46 batches hold each query once
    assert planned_steps(replace(job, optim=OptimSettings(steps=7)), 1469) == 7
    assert planned_steps(replace(job, batch=BatchSettings(queries=32, mode="tasks")), 1469) is None
