"""Real runs that get worse: the best checkpoint on dev stands for the run, the last one is beside it, a verdict says how it went.

Weights are spoilt and healed by the test behind an update, so that evaluations of real weights fall and rise.
"""

import json
import logging
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import trainer.milestones
import trainer.train
from launch.models import evaluate_named
from launch.named import model_folder, read_settings
from tests.ranks import run_ranks
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.data.datasets import open_dataset
from trainer.encoder.settings import ModelSettings
from trainer.evaluate import MEASURES, Stopped
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings
from trainer.handoff.weights import best_checkpoint, newest_checkpoint, read_best, steps_on_disk
from trainer.job import BatchSettings, CheckpointSettings, EvalSettings, OptimSettings, ParallelSettings, TrainJob
from trainer.metrics import read_status
from trainer.scores import read_scores
from trainer.train import train
from trainer.update import update
from trainer.verdict import paired_interval


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finish")
    write_tiny_dataset(folder / "data", num_queries=600)  # 100 test queries, 50 on dev
    write_tiny_encoder(folder / "encoder", dropout=0.0)
    return folder


def job_of(root, run, **sections):
    given = {
        "run": RunSettings(folder=root / run, trackers=()),
        "data": DataSettings(path=root / "data", cache=root / "cache"),
        "model": ModelSettings(name=str(root / "encoder"), dropout=0.0),
        "batch": BatchSettings(queries=32),
        "optim": OptimSettings(steps=10, lr=1e-3),
        "checkpoint": CheckpointSettings(every_steps=100, keep=1),
        "negatives": NegativesSettings(per_query=0),
        **sections,
    }
    return TrainJob(**given)


def spoiling(monkeypatch, steps):
    """Have weights be noise behind the updates of some steps, counted from 1, and what they were before behind all others."""
    held = {}

    def update_and_spoil(run):
        encoder, step = run.state.parallel.encoder, run.state.step + 1
        if held:
            encoder.load_state_dict(held)
        norm = update(run)
        held.update({name: value.clone() for name, value in encoder.state_dict().items()})
        if step in steps:
            draw = torch.Generator().manual_seed(10)
            with torch.no_grad():
                for weight in encoder.parameters():
                    weight.add_(torch.randn(weight.shape, generator=draw))
        return norm

    monkeypatch.setattr(trainer.train, "update", update_and_spoil)


def lines(job):
    return [json.loads(line) for line in (job.run.folder / "logs" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def spoilt(root):
    """A run that is at its best on the way, falls, comes back and falls again."""
    with pytest.MonkeyPatch.context() as patch:
        spoiling(patch, {5, 6, 9, 10})
        job = job_of(root, "spoilt", eval=EvalSettings(every_steps=2))
        outcome = train(job, world_of())
    return job, outcome


def mrr(folder, root, split="test"):
    """Return MRR@10 by sentence-transformers' own encoding and numpy; ties in any order."""
    model, data = SentenceTransformer(str(folder), device="cpu"), open_dataset(root / "data", root / "cache")
    rows, qrels = data.training_queries(split), data.qrels[split]
    scores = model.encode(data.queries.select(rows)["text"]) @ model.encode(data.corpus["text"]).T
    found = []
    for row, order in zip(rows, np.argsort(-scores, axis=1)[:, :10], strict=True):
        ranks = np.flatnonzero(np.isin(order, qrels.corpus_rows[qrels.query_rows == row]))
        found.append(1 / (1 + ranks[0]) if len(ranks) else 0)
    return np.mean(found)


def test_the_best_checkpoint_is_tested_as_the_model_and_the_last_beside_it(spoilt, root):
    job, outcome = spoilt
    run, results = job.run.folder, json.loads((job.run.folder / "results.json").read_text())
    on_dev = {line["step"]: line["dev/ndcg@10"] for line in lines(job) if "dev/ndcg@10" in line}
    assert list(on_dev) == [0, 2, 4, 6, 8, 10] and on_dev[10] < on_dev[8] > on_dev[6] < on_dev[4]
    best = max((step for step in on_dev if step), key=on_dev.get)
    assert results["steps"] == {"trained": best, "last": 10} and outcome.evaluations["trained"]["step"] == best
    # Its own step has no scheduled checkpoint, and only the newest one is to be kept.
    assert steps_on_disk(run) == [best, 10] and read_best(run) == f"step-{best:08d}"
    # Equal texts share a score nearly, and stand in any order there.
    assert results["trained"]["mrr@10"] == pytest.approx(mrr(run / f"checkpoints/step-{best:08d}/encoder", root), abs=0.03)
    assert results["last"]["mrr@10"] == pytest.approx(mrr(run / "checkpoints/step-00000010/encoder", root), abs=0.03)
    assert results["last"]["ndcg@10"] < results["trained"]["ndcg@10"] - 0.1


def test_intervals_in_the_results_are_those_of_the_kept_queries(spoilt):
    job, _ = spoilt
    results = json.loads((job.run.folder / "results.json").read_text())
    kept = {name: read_scores(job.run.folder, name) for name in ("untrained", "trained", "last")}
    for name, scores in kept.items():
        assert scores.each_QM.shape == (100, 4) and scores.measures == results[name]
        assert scores.each_QM.mean(0) == pytest.approx([results[name][measure] for measure in MEASURES], abs=1e-5)
        low, high = results["intervals"][name]["mrr@10"]
        assert low <= results[name]["mrr@10"] <= high
    paired = paired_interval(kept["trained"].of_each("ndcg@10"), kept["untrained"].of_each("ndcg@10"))
    assert results["intervals"]["trained - untrained"]["ndcg@10"] == pytest.approx(paired, abs=1e-4)


def test_a_run_folder_stands_for_its_best_checkpoint(spoilt, root):
    job, _ = spoilt
    run, results = job.run.folder, json.loads((job.run.folder / "results.json").read_text())
    best = results["steps"]["trained"]
    assert best_checkpoint(run).step == best and newest_checkpoint(run).step == 10
    assert model_folder(str(run)) == str(run / "checkpoints" / f"step-{best:08d}" / "encoder")
    found = evaluate_named(str(run), read_settings([f"data.cache={root / 'cache'}"], root / "data"), "test")
    assert found == pytest.approx(results["trained"], abs=1e-6)


def test_a_best_checkpoint_that_is_gone_or_torn_gives_its_place_to_the_newest(spoilt, tmp_path):
    job, _ = spoilt
    run = shutil.copytree(job.run.folder, tmp_path / "run")
    (run / "checkpoints" / read_best(run) / "encoder" / "model.safetensors").write_bytes(b"torn")
    said = []
    assert best_checkpoint(run, said.append).step == 10 and len(said) == 1
    (run / "checkpoints" / "BEST").write_text("step-00000003\n")
    assert best_checkpoint(run).step == 10


def test_a_fall_on_dev_is_warned_of_while_it_lasts(spoilt):
    job, _ = spoilt
    said = [(line["step"], line["event"], line["kind"]) for line in lines(job) if "warning" in line.get("event", "")]
    for kind in ("dev_below_untrained", "dev_below_best"):
        assert [(step, event) for step, event, of in said if of == kind] == [
            (6, "warning"),
            (8, "warning over"),
            (10, "warning"),
        ]
    status = read_status(job.run.folder, "trainer")
    now = {warning["kind"]: warning for warning in status["warnings"]}
    assert now["dev_below_best"]["step"] == 10 and "at its best, at step" in now["dev_below_best"]["sentence"]
    assert "checkpoint_interval" in now, "the job's own numbers"
    assert status["verdict"]["level"] in ("better", "unclear") and status["phase"] == "finished"
    assert {"dev_below_best", "checkpoint_interval"} <= {warning["kind"] for warning in status["verdict"]["warnings"]}


def test_a_trained_model_that_is_worse_gets_the_verdict_and_its_end_is_no_failure(root, monkeypatch, caplog):
    spoiling(monkeypatch, {1, 2})
    job = job_of(root, "worse", optim=OptimSettings(steps=2))
    assert train(job, world_of()).finished
    results = json.loads((job.run.folder / "results.json").read_text())
    low, high = results["intervals"]["trained - untrained"]["ndcg@10"]
    assert low < high < 0 and results["verdict"]["level"] == "worse" and "last" not in results
    assert results["verdict"]["sentence"].startswith("Worse than the untrained model: nDCG@10 ")
    assert results["verdict"]["sentence"] in caplog.text
    assert read_status(job.run.folder, "trainer")["verdict"] == results["verdict"]
    assert read_best(job.run.folder) is None and best_checkpoint(job.run.folder).step == 2, "nothing on dev says otherwise"


def test_a_run_that_goes_on_for_longer_is_tested_anew(root):
    job = job_of(root, "longer", optim=OptimSettings(steps=2), checkpoint=CheckpointSettings(every_steps=1))
    before = train(job, world_of()).evaluations
    after = train(replace(job, optim=OptimSettings(steps=4)), world_of()).evaluations
    assert (before["trained"]["step"], after["trained"]["step"]) == (2, 4)
    assert before["untrained"] == after["untrained"] and before["trained"] != after["trained"]
    assert json.loads((job.run.folder / "results.json").read_text())["steps"] == {"trained": 4}


def test_without_a_test_split_the_verdict_says_that_nothing_was_tested(root):
    job = job_of(root, "untested", optim=OptimSettings(steps=1), eval=EvalSettings(split="none"))
    train(job, world_of())
    results = json.loads((job.run.folder / "results.json").read_text())
    assert results["verdict"]["level"] == "unclear" and "not tested" in results["verdict"]["sentence"]


def train_faster_at_the_end(rank, job):
    """Train with a learning rate that throws the weights far away in the last steps."""

    def prepared(*args, prepare=trainer.train.prepare):
        run = prepare(*args)
        factor = run.lr_factor
        run.lr_factor = lambda step: factor(step) * (1 if step < 4 else 200)
        return run

    trainer.train.prepare = prepared
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("trainer.train").addHandler(handler)
    logging.getLogger("trainer.train").setLevel("INFO")
    return train(job, world_of(rank)).evaluations, [line for line in said if "travel" in line]


def test_the_best_checkpoint_is_tested_by_all_ranks_together(root):
    job = job_of(root, "ranks", eval=EvalSettings(every_steps=2), parallel=ParallelSettings(backend="fsdp2"))
    job = replace(job, optim=OptimSettings(steps=6, lr=1e-3))
    (first, said), (_, said_by_the_other) = run_ranks(train_faster_at_the_end, 2, job)
    numbers = r"a rank would move for passages \S+ GiB, queries \S+ GiB a step"
    assert len(said) == 1 and re.fullmatch(rf"step 1: \w+ travel to the other ranks, loss\.gather=auto; {numbers}", said[0])
    assert said_by_the_other == said, "every rank comes to the same choice by the same numbers"
    assert (first["trained"]["step"], first["last"]["step"]) == (4, 6)
    assert json.loads((job.run.folder / "results.json").read_text())["steps"] == {"trained": 4, "last": 6}
    encoder = job.run.folder / "checkpoints" / "step-00000004" / "encoder"
    assert first["trained"]["mrr@10"] == pytest.approx(mrr(encoder, root), abs=0.03)


def test_a_run_that_was_stopped_at_its_last_evaluation_makes_up_for_it(root, monkeypatch):
    job = job_of(root, "stopped", optim=OptimSettings(steps=2), eval=EvalSettings(every_steps=1, split="none"))
    calls, evaluate = [], trainer.milestones.evaluate

    def stopped_once(*args, **options):
        calls.append(args)
        if len(calls) == 3:  # on dev, at the last step
            raise Stopped
        return evaluate(*args, **options)

    monkeypatch.setattr(trainer.milestones, "evaluate", stopped_once)
    assert not train(job, world_of()).finished and train(job, world_of()).finished
    on_dev = {line["step"]: line["dev/ndcg@10"] for line in lines(job) if "dev/ndcg@10" in line}
    assert list(on_dev) == [0, 1, 2] and len(calls) == 4
    assert read_best(job.run.folder) == f"step-{2 if on_dev[2] > on_dev[1] else 1:08d}"
