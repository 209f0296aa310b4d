"""Every command as a person types it, one process each, and what it prints with --json."""

import json
import os
import subprocess
import sys

import pytest

from launch.local import mpi_command
from tests.tiny import write_tiny_dataset, write_tiny_encoder

JOB = """
[run]
folder = "{root}/run"
[data]
path = "{root}/data"
cache = "{root}/cache/negpool"
[model]
name = "{root}/encoder"
[batch]
queries = 6
[optim]
steps = 4
[checkpoint]
every_steps = 2
[negatives]
per_query = 0
[search]
top_k = 20
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder")
    (folder / "job.toml").write_text(JOB.format(root=folder))
    return folder


def call(root, *words, launcher=(), exit_code=0):
    """Run a command and return its standard output and standard error."""
    command = [*launcher, sys.executable, "-m", "launch", *map(str, words)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert found.returncode == exit_code, found.stderr[-3000:]
    assert "Traceback" not in found.stderr
    return found.stdout, found.stderr


@pytest.fixture(scope="module")
def trained(root):
    """A run of one trainer process, then one refresh by two MPI ranks."""
    outcome = json.loads(call(root, "train", root / "job.toml", "--json")[0])
    assert outcome["finished"] and outcome["step"] == 4 and outcome["evaluations"].keys() == {"untrained", "trained"}
    call(root, "mine", root / "job.toml", "--once", launcher=mpi_command(2))
    return outcome


def test_train_alone_and_mine_once_leave_a_checkpoint_and_two_versions(root, trained):
    manifests = sorted((root / "run" / "negatives").glob("*/manifest.json"))
    assert [json.loads(m.read_text())["checkpoint_step"] for m in manifests] == [None, 4]


def test_eval_repeats_the_runs_own_figures(root, trained):
    found = json.loads(call(root, "eval", root / "run", root / "data", "--json")[0])
    wanted = trained["evaluations"]["trained"]
    assert {key: found[key] for key in ("mrr@10", "ndcg@10")} == {key: wanted[key] for key in ("mrr@10", "ndcg@10")}
    assert "MRR@10" in call(root, "eval", "bm25", root / "data")[0]
    assert "has no qrels/final.tsv" in call(root, "eval", "bm25", root / "data", "--split", "final", exit_code=2)[1]


def test_search_finds_what_shares_the_questions_words(root, trained):
    found = json.loads(call(root, "search", root / "run", root / "data", "sort list merge", "--top", 3, "--json")[0])
    assert len(found["results"]) == 3
    assert [hit["score"] for hit in found["results"]] == sorted((h["score"] for h in found["results"]), reverse=True)
    text = call(root, "search", root / "run", root / "data", "sort", "list")[0]
    assert "1. d" in text


def test_status_says_where_the_run_stands(root, trained):
    found = json.loads(call(root, "status", root / "run", "--json")[0])
    assert found["trainer"]["phase"] == "finished" and found["checkpoint"] == "step-00000004"
    assert "finished" in call(root, "status", root / "run")[0]
    assert "is not a run folder" in call(root, "status", root / "data", exit_code=2)[1]


def test_data_check_prints_statistics_and_problems(root, tmp_path):
    assert "no problems" in call(root, "data", "check", root / "data")[0]
    folder = write_tiny_dataset(tmp_path / "bad")
    (folder / "qrels" / "dev.tsv").write_text("q5\tnobody\t1\n")
    report = json.loads(call(root, "data", "check", folder, "--json", exit_code=2)[0])
    assert [(p["line"], p["kind"]) for p in report["problems"]] == [(1, "unknown document")]


def test_an_unknown_command_or_option_is_exit_2(root):
    assert "No such command 'tran'" in call(root, "tran", exit_code=2)[1]
    call(root, "train", "--fast", exit_code=2)
