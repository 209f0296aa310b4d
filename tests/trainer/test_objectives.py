"""Objectives by their names in a job: each trains, what it learns survives a restart, and what it needs is asked for."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from gradcache import OBJECTIVES
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.jobs import tiny_job
from tests.trainer.worlds import world_of
from trainer.errors import InputError
from trainer.handoff.weights import open_checkpoint
from trainer.job import EvalSettings
from trainer.loss_settings import LossSettings
from trainer.train import train

OWN = """
from gradcache import InfoNCE


def scaled(times: float = 1.0):
    class Scaled(InfoNCE):
        def loss(self, rows):
            return times * super().loss(rows)

    return Scaled()
"""
NEEDS = {"alignment_uniformity": {"same_side": True}}  # of section loss
GRADED = ("cosent", "angle", "correlation")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    write_tiny_dataset(folder / "data")
    write_tiny_dataset(folder / "graded")
    qrels = folder / "graded" / "qrels" / "train.tsv"
    head, *rows = qrels.read_text().splitlines()
    rows = [row.rpartition("\t")[0] + f"\t{1 + number % 3}" for number, row in enumerate(rows)]
    qrels.write_text("\n".join([head, *rows]) + "\n")
    write_tiny_encoder(folder / "encoder")
    return folder


@pytest.fixture
def job(root, tmp_path):
    return replace(tiny_job(root, tmp_path / "run", steps=4), eval=EvalSettings(split="none"))


def losses(job):
    lines = (job.run.folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def learnt(job, step):
    checkpoint = open_checkpoint(job.run.folder / "checkpoints" / f"step-{step:08d}")
    return json.loads((checkpoint.folder / "state" / "trainer.json").read_text())["objectives"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_name_trains(job, root, name):
    data = replace(job.data, path=root / ("graded" if name in GRADED else "data"))
    job = replace(job, data=data, loss=LossSettings(objective=name, **NEEDS.get(name, {})))
    assert train(job, world_of()).step == 4
    assert len(losses(job)) == 4 and np.isfinite(losses(job)).all() and len(set(losses(job))) == 4


def test_what_an_objective_learns_goes_on_where_it_was(job, tmp_path):
    whole = replace(job, loss=LossSettings(objective="sigmoid", parameters={"bias": -3}))
    train(whole, world_of())
    assert learnt(whole, 2)["loss.bias"]["value"] != -3 and learnt(whole, 4)["loss.bias"]["exp_avg_sq"] > 0
    halves = replace(whole, run=replace(whole.run, folder=tmp_path / "halves"))
    shutil.copytree(whole.run.folder, halves.run.folder)
    shutil.rmtree(halves.run.folder / "checkpoints" / "step-00000004")
    (halves.run.folder / "checkpoints" / "LATEST").write_text("step-00000002\n")
    (halves.run.folder / "logs" / "metrics.jsonl").unlink()
    assert train(halves, world_of()).step == 4 and len(losses(halves)) == 2
    assert learnt(halves, 4) == learnt(whole, 4) and losses(halves)[-1] == losses(whole)[-1]


def test_an_objective_of_ones_own_is_named_by_its_module(job, tmp_path, monkeypatch):
    (tmp_path / "losses_of_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    train(job, world_of())
    own = replace(job, run=replace(job.run, folder=tmp_path / "own"))
    own = replace(own, loss=LossSettings(objective="losses_of_mine:scaled", parameters={"times": 2}))
    train(own, world_of())
    assert losses(own)[0] == pytest.approx(2 * losses(job)[0], rel=1e-6)


def test_grades_that_are_all_equal_order_nothing(job):
    with pytest.raises(InputError, match=r"loss\.objective='cosent' orders pairs by their grades, and all 43 pairs have grade 1"):
        train(replace(job, loss=LossSettings(objective="cosent")), world_of())


def test_own_negatives_that_no_query_brings_are_refused(job):
    with pytest.raises(InputError, match=r"looks at the hard negatives that a query brings; set negatives\.per_query"):
        replace(job, loss=LossSettings(parameters={"in_batch": False}))
