"""The end of `negpool run`: a table with intervals, the best and the last checkpoint, a verdict, and what was warned of."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from launch.foreseen_warnings import warnings_of_job
from launch.jobfile import read_job
from launch.main_job import collect_results, tell_results
from launch.models import evaluate_bm25
from launch.output import FEW_QUERIES, measures_table
from tests.tiny import write_tiny_dataset
from trainer.data.datasets import open_data
from trainer.evaluate import MEASURES, means
from trainer.handoff.manifest import publish_version, write_latest
from trainer.handoff.weights import checkpoint_name, checkpoints_folder, write_best
from trainer.metrics import Status
from trainer.scores import Scores, write_scores


@pytest.fixture
def jobs(tmp_path):
    write_tiny_dataset(tmp_path / "data", num_queries=300)
    paths = [f"data.path={tmp_path / 'data'}", f"data.cache={tmp_path / 'cache'}", f"run.folder={tmp_path / 'run'}"]
    return read_job(None, [*paths, "optim.steps=30", "checkpoint.every_steps=10", "stop.measure=mrr@10", "search.top_k=40"])


def leave(run, name, step, shift, split="test"):
    """Leave an evaluation of 50 queries, each a step better or worse than another."""
    each_QM = np.clip(np.linspace(0.2, 0.6, 50)[:, None] + shift + np.zeros(len(MEASURES)), 0, 1)
    write_scores(run, name, Scores(step, split, means(each_QM), each_QM))


def told(jobs, width=80):
    data = open_data(jobs.train.data, jobs.train.sources)
    results = collect_results(jobs, data, 61.0)
    said = io.StringIO()
    tell_results(Console(file=said, width=width, soft_wrap=True), jobs, data, results)
    return results, said.getvalue()


def publish(run, *steps):
    for step in steps:
        folder = checkpoints_folder(run) / checkpoint_name(step)
        publish_version(folder, lambda staging: (staging / "encoder").mkdir(), {"step": step})
        write_latest(folder.parent, folder.name)


def test_a_run_starts_its_sides_before_it_imports_what_only_its_end_needs():
    code = "import sys, launch.commands, launch.main_job; print(*{'torch', 'transformers', 'accelerate'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_the_table_shows_the_best_and_the_last_with_intervals_and_the_verdict_below(jobs):
    run = jobs.train.run.folder
    publish(run, 20, 30)
    write_best(run, 20)
    for name, step, shift in (("untrained", 0, 0.0), ("trained", 20, 0.15), ("last", 30, -0.1)):
        leave(run, name, step, shift)
    status = Status(run, "miner")
    status.update(phase="watching", warnings=[{"kind": "top_k", "sentence": "search.top_k is most of it.", "step": None}])
    results, said = told(jobs)
    assert results["bm25"] == pytest.approx(evaluate_bm25(open_data(jobs.train.data, {}), "test"))
    assert results["steps"] == {"trained": 20, "last": 30} and results["seconds"] == 61.0
    assert results["verdict"]["level"] == "better" and results == json.loads((run / "results.json").read_text())
    lines = said.splitlines()
    titles = ("BM25", "untrained model", "trained model, best on dev", "trained model, last step")
    rows = {title: next(i for i, line in enumerate(lines) if f" {title} " in line) for title in titles}
    assert sorted(rows.values()) == list(rows.values())
    best = rows["trained model, best on dev"]
    assert "0.550" in lines[best] and "of step 20" in lines[best + 1]
    assert "0.300" in lines[rows["trained model, last step"]] and "of step 30" in lines[rows["trained model, last step"] + 1]
    low, high = results["intervals"]["trained"]["mrr@10"]
    assert f"{low:.2f}-{high:.2f}" in lines[best + 1] and max(map(len, lines[:best])) <= 80
    end = next(i for i, line in enumerate(lines) if line.startswith("└"))
    assert "95 % interval" in lines[end + 1] and lines[end + 2].startswith(
        "Better than the untrained model: MRR@10 0.400 -> 0.550"
    )
    assert "warning: search.top_k is most of it." in said
    assert f"The model:     {run}/checkpoints/step-00000020/encoder" in said


def test_a_model_that_is_worse_than_both_is_said_to_be(jobs):
    run = jobs.train.run.folder
    publish(run, 30)
    leave(run, "untrained", 0, 0.3)
    leave(run, "trained", 30, -0.2)
    results, said = told(jobs)
    assert results["verdict"]["level"] == "worse" and results["steps"] == {"trained": 30}
    assert "Worse than the untrained model: MRR@10 0.700 -> 0.200" in said and "Worse than BM25: MRR@10" in said
    assert "of step" not in said, "there is but one checkpoint"


def test_an_evaluation_of_another_split_is_no_result(jobs):
    run = jobs.train.run.folder
    publish(run, 30)
    leave(run, "untrained", 0, 0.0, split="dev")
    leave(run, "trained", 30, 0.0)
    results, said = told(jobs)
    assert "untrained" not in results and results["verdict"]["level"] == "unclear" and "trained model" in said


def test_many_queries_need_no_intervals_in_the_table():
    rows = {"trained": dict.fromkeys(MEASURES, 0.5)}
    said = io.StringIO()
    Console(file=said, width=80).print(measures_table(rows, "title"))
    assert len(said.getvalue().splitlines()) == 6 and FEW_QUERIES == 2000


def test_numbers_that_defeat_the_job_are_said_before_anything_starts(jobs):
    data = open_data(jobs.train.data, {})
    assert warnings_of_job(jobs, data) == []
    hopeless = replace(jobs.mine, search=replace(jobs.mine.search, top_k=300))
    slow = replace(jobs.train, checkpoint=replace(jobs.train.checkpoint, every_steps=200))
    said = warnings_of_job(replace(jobs, mine=hopeless, train=slow), data)
    assert ["checkpoint.every_steps=200" in said[0], "search.top_k=300" in said[1]] == [True, True] and len(said) == 2
