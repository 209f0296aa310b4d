"""What `negpool run --dry-run` foresees, against what a run then does, and plain arithmetic."""

import io
import json

import pytest
import torch
from rich.console import Console

from launch.foresee import count_steps, disk_bytes, foresee, swap_steps, trainer_memory
from launch.foreseen import foreseen_text
from launch.foreseen_warnings import warnings_of_plan
from launch.jobfile import read_job
from launch.shares import Shares
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.data.datasets import open_data
from trainer.errors import InputError
from trainer.train import train

WORDS = ["batch.queries=8", "optim.epochs=2", "checkpoint.every_steps=3", "launch.train_ranks=1", "negatives.first_wait_s=0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("foresee")
    write_tiny_dataset(root / "data")
    write_tiny_encoder(root / "encoder")
    return root


def job(root, *words):
    paths = [f"data.path={root}/data", f"data.cache={root}/cache", f"model.name={root}/encoder", f"run.folder={root}/run"]
    return read_job(None, [*paths, *WORDS, "precision.products=fp32", "encode.stored=fp32", *words])


def test_the_run_takes_the_steps_and_tokens_that_were_foreseen(root):
    jobs = job(root, "negatives.per_query=0", "eval.split=none", "model.dropout=0")
    found = foresee(jobs)
    assert not (root / "run").exists(), "nothing is kept"
    outcome = train(jobs.train, world_of())
    steps = found["steps"]
    assert steps["steps"] == outcome.step == 10 and steps["per_epoch"] == 5 and steps["passages_a_step"] == 8
    lines = map(json.loads, (root / "run" / "logs" / "metrics.jsonl").read_text().splitlines())
    tokens = [line["tokens_per_rank_per_s"] * line["time/step_s"] for line in lines if "loss" in line]
    mean = sum(tokens) / len(tokens)
    assert steps["tokens_a_step_and_rank"] == pytest.approx(mean, rel=0.15), "four queries are left for the last of an epoch"
    assert found["time"]["evaluations"] == 0 and found["time"]["swaps"] == []


def test_memory_time_and_disk_are_told_in_sentences_on_eighty_columns(root):
    found = foresee(job(root, "eval.every_steps=3"))
    assert found["time"]["evaluations"] == 2 + 5, "on dev at the steps 0, 3, 6, 9 and 10"
    assert found["time"]["total_s"] > found["time"]["step_s"] > 0
    trainer = found["memory"]["trainer"]
    assert all(size >= 0 for size in trainer.values()) and sum(trainer.values()) > 0
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(foreseen_text(found))
    said = console.export_text()
    assert max(map(len, said.splitlines())) <= 80 and "36 training queries" in said and "Nothing was started." in said
    assert "8 queries against 16 passages" in said and "1 trainer rank, 1 miner rank" in said


def test_what_will_not_go_well_is_said_with_its_setting(tmp_path):
    plan = {
        "run": str(tmp_path / "not" / "there"),
        "steps": {"steps": 20},
        "time": {"swaps": [], "refresh_s": 60.0, "step_s": 2.0},
        "memory": {"trainer": {"weights": 1e6}, "miner": {"total_gib": 1.0}},
        "disk_gib": 1e9,
    }
    negatives, memory, disk = warnings_of_plan(plan, Shares(2, 1, 1), draws_negatives=True)
    assert "a refresh takes as long as some 30 steps, and the run has 20; set optim.epochs higher" in negatives
    assert "optim.steps higher" in warnings_of_plan(plan, Shares(2, 1, 1), True, "optim.steps")[0]
    assert "2000001.0 GiB are needed" in memory and "chunk.tokens" in memory and "checkpoint.keep" in disk
    fine = {**plan, "memory": {"trainer": {"weights": 0.0}, "miner": {"total_gib": 0.0}}, "disk_gib": 0.0}
    assert warnings_of_plan(fine, Shares(2, 1, 1), draws_negatives=False) == []


def test_swaps_follow_the_checkpoints_as_fast_as_the_miner_is():
    assert swap_steps(30, 10, 2) == [2, 12, 22], "of step 0, 10 and 20; the last one is not mined"
    assert swap_steps(30, 10, 15) == [15], "then the one of step 10 takes until step 30"
    assert swap_steps(100, 10, 25) == [25, 50, 75] and swap_steps(30, 10, 40) == []


def test_disk_is_that_of_checkpoints_embeddings_and_versions(root):
    jobs = job(root, "checkpoint.keep=1", "mine.keep_encodings=2", "mine.keep_versions=1", "sample.num_negatives=10")
    data = open_data(jobs.train.data, {})
    expected = 2 * 1000 * 16 + 2 * (len(data.corpus) + 36) * 32 * 4 + 3 * 36 * (10 * 12 + 8 + 4)
    assert disk_bytes(jobs, data, 36, 32, 1000) == expected


def test_a_fixed_number_of_steps_and_all_negatives_are_counted(root):
    jobs = job(root, "optim.steps=7", "negatives.per_query=all", "sample.num_negatives=3")
    data = open_data(jobs.train.data, {})
    found = count_steps(jobs, data, Shares(2, 1, 1), {"query": 5.0, "passage": 10.0})
    assert (found["steps"], found["epochs"], found["passages_a_step"]) == (7, 1.4, 32)
    assert found["tokens_a_step_and_rank"] == (8 * 5 + 32 * 10) / 2


def test_a_job_that_cannot_run_is_refused(root):
    with pytest.raises(InputError, match="36 training queries, fewer than batch"):
        foresee(job(root, "batch.queries=500"))


def test_a_trainer_rank_is_foreseen_as_the_trainer_plans_it(root):
    counts = {"queries_a_step": 8192, "passages_a_step": 65536, "tokens_a_step_and_rank": 10}

    def foreseen(ranks, *words):
        encoder = torch.nn.Linear(4, 4)
        encoder.width = 4
        return trainer_memory(job(root, *words), Shares(ranks, 1, 1), encoder, counts, 1.0)

    def kept(ranks, *words):
        return foreseen(ranks, *words)["scores kept"]

    assert kept(1) == kept(2, "loss.gather=passages") == 0
    assert kept(4) == 0.5 and kept(2, "loss.keep_scores_gib=9") == 1 and kept(1024) == pytest.approx(2 / 1024, abs=1e-3)
    assert kept(2, "loss.keep_scores_gib=0.25", "loss.gather=queries") == 0.25
    assert foreseen(1, "loss.tile_rows=1024")["a tile of scores"] == pytest.approx(0.25 + 2 * 4 / 1024, abs=1e-3)
