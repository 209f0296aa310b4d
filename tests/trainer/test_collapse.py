"""A model that gives all texts one embedding ends its run, whatever made it so, and nothing is mined from it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import trainer.train
from gradcache import Batch, InfoNCE, Tower
from gradcache.agree import agree
from launch.named import model_folder
from mining.table.audit import reasons_of_collapse
from tests.ranks import run_ranks
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.collapse import SHARE, STEPS, Collapse
from trainer.encoder.model import ModelSettings
from trainer.errors import MustNotGoOn
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings
from trainer.handoff.weights import best_checkpoint, checkpoint_name, checkpoints_folder, newest_checkpoint
from trainer.job import BatchSettings, CheckpointSettings, EvalSettings, OptimSettings, TrainJob
from trainer.metrics import read_status
from trainer.symptoms import NARROW
from trainer.train import train

SIDES = {0: (4, 7), 1: (1, 1), 2: (0, 0)}  # queries and passages of each rank


def embeddings(rank):
    queries, passages = SIDES[rank]
    return np.random.default_rng(rank).normal(1, 0.5, (queries + passages, 8)).astype(np.float32)


def spread_of(rank, num_ranks):
    num_queries, num_passages = SIDES[rank]
    keys, target = torch.arange(num_queries + num_passages), torch.zeros(num_queries, dtype=torch.int64)
    tower = Tower(encode=lambda rows: rows, lengths=torch.ones_like(keys), load=lambda rows: rows)
    batch = Batch(towers=[tower], num_queries=num_queries, keys=keys, target=target, positive_keys=target[:, None])
    found = torch.from_numpy(embeddings(rank)) if len(keys) else None
    encoding = SimpleNamespace(embedding_nD=found, widths={8} if len(keys) else set())
    group = dist.group.WORLD if num_ranks > 1 else None
    return agree(batch, encoding, InfoNCE(), 0, group, torch.device("cpu")).spread  # type: ignore[arg-type]


def plain_spread(rows_nD):
    unit_nD = rows_nD / np.linalg.norm(rows_nD, axis=1, keepdims=True)
    return 1 - (unit_nD @ unit_nD.T)[~np.eye(len(rows_nD), dtype=bool)].mean()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_spread_is_that_of_all_pairs_of_a_side_and_one_for_all_ranks(num_ranks):
    queries, passages = np.split(embeddings(0), [SIDES[0][0]])
    wanted = max(plain_spread(queries), plain_spread(passages))
    assert run_ranks(spread_of, num_ranks, num_ranks) == pytest.approx([wanted] * num_ranks, abs=1e-6)


def test_rows_without_a_pair_have_no_spread(monkeypatch):
    monkeypatch.setitem(SIDES, 0, (1, 1))
    assert spread_of(0, 1) is None


def test_a_collapse_is_a_fall_of_the_spread_that_stays():
    narrow = SHARE * 0.5 * 0.9
    for spreads, wanted in (
        ([0.5] * 9, False),
        ([0.001] * 9, False),  # so from the beginning, as with a model that has not been trained: it may spread yet
        ([0.5, *[narrow] * STEPS], True),
        ([0.5, *[narrow] * (STEPS - 1), 0.4, narrow], False),
        ([0.5, *[narrow, None] * STEPS], True),  # a batch of one query says nothing
    ):
        collapse = Collapse()
        assert [collapse.observe(spread) for spread in spreads][-1] == wanted, spreads


@pytest.fixture
def job(tmp_path):
    return TrainJob(
        run=RunSettings(folder=tmp_path / "run", trackers=()),
        data=DataSettings(path=write_tiny_dataset(tmp_path / "data"), cache=tmp_path / "cache"),
        model=ModelSettings(name=str(write_tiny_encoder(tmp_path / "encoder")), dropout=0.0),
        batch=BatchSettings(queries=12),
        optim=OptimSettings(steps=40, lr=10.0),
        checkpoint=CheckpointSettings(every_steps=2, keep=40),
        eval=EvalSettings(split="none"),
        negatives=NegativesSettings(per_query=0),
    )


def test_an_evaluation_that_finds_one_embedding_ends_the_run(job):
    job = replace(job, optim=OptimSettings(steps=3, lr=10.0), eval=EvalSettings(split="test"))
    with pytest.raises(MustNotGoOn, match=r"step 3: .* all evaluated texts .*; the last good checkpoint is .*step-00000000;"):
        train(job, world_of())


@pytest.mark.parametrize("keep", [40, 1])
def test_a_run_that_collapses_ends_and_names_the_last_checkpoint_before_it(job, keep):
    job = replace(job, checkpoint=replace(job.checkpoint, keep=keep))
    with pytest.raises(MustNotGoOn, match="all texts have nearly one embedding") as error:
        train(job, world_of())
    collapse, found = Collapse(), []
    lines = (job.run.folder / "logs" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        if "spread" in line:
            found.append((line["step"], collapse.observe(line["spread"])))
    *before, (last, has_collapsed) = found
    assert has_collapsed and not any(each for _, each in before) and last < 40
    good = (last - STEPS - 1) // 2 * 2
    named = f"the last good checkpoint is {checkpoints_folder(job.run.folder) / checkpoint_name(good)};"
    assert (named if keep == 40 else "none of its checkpoints is from before that;") in str(error.value)


def test_a_collapsed_run_says_so_wherever_people_look_and_stands_for_its_last_good_checkpoint(job):
    job = replace(job, eval=EvalSettings(split="test"))
    with pytest.raises(MustNotGoOn) as error:
        train(job, world_of())
    run = job.run.folder
    results = json.loads((run / "results.json").read_text())
    assert results["verdict"]["level"] == "collapsed" and results["verdict"]["sentence"] == str(error.value)
    assert "ndcg@10" in results["untrained"] and "trained" not in results
    status = read_status(run, "trainer")
    assert {"collapsed", "gradient_zero", "embeddings_narrow"} <= {warning["kind"] for warning in status["warnings"]}
    assert status["warnings"][-1] == {"kind": "collapsed", "sentence": str(error.value), "step": status["step"]}
    good = best_checkpoint(run)
    assert f"the last good checkpoint is {good.folder};" in str(error.value)
    assert newest_checkpoint(run).step > good.step and model_folder(str(run)) == str(good.encoder_folder)


def test_embeddings_that_come_together_are_warned_of_before_they_collapse(job, monkeypatch):
    spreads = iter([0.5] * 3 + [0.5 * NARROW * 0.9] * (STEPS + 2) + [0.5] * STEPS)
    monkeypatch.setattr(trainer.train, "step", lambda run, step=trainer.train.step: replace(step(run), spread=next(spreads)))
    train(replace(job, optim=OptimSettings(steps=3 + STEPS + 2 + STEPS, lr=1e-3)), world_of())
    lines = map(json.loads, (job.run.folder / "logs" / "metrics.jsonl").read_text().splitlines())
    said = [(line["step"], line["event"]) for line in lines if line.get("kind") == "embeddings_narrow"]
    assert said == [(3 + STEPS, "warning"), (3 + STEPS + 2 + STEPS, "warning over")]


def test_a_run_that_learns_does_not_collapse(job):
    assert train(replace(job, optim=OptimSettings(steps=12, lr=1e-3)), world_of()).finished


def test_embeddings_that_are_one_are_not_searched():
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float16)
    one = np.ones((50, 8), np.float16) + rows * np.float16(1e-3)
    assert reasons_of_collapse({"queries": rows, "passages": 5 + rows / 2}) == []
    assert reasons_of_collapse({"queries": rows[:1], "passages": rows[:0]}) == []
    assert ["passages" in reason for reason in reasons_of_collapse({"queries": rows, "passages": one})] == [True]
