"""Commands that we show are commands that a shell takes."""

import os
import shlex

import pytest

from launch.jobfile import read_job
from launch.recipe import as_typed, mine_command, train_command
from launch.sides import _tell_absent
from trainer.handoff.claim import claim_side

WORDS = ["my job.toml", "model.query_prefix=ask: ", 'data.columns={query = "q", positive = "$p"}', "--json"]


@pytest.mark.parametrize(
    ("program", "begins"),
    [("/usr/bin/negpool", ["negpool"]), ("/somewhere/negpool.py", ["python", "-m", "negpool"])],
)
def test_a_command_is_repeated_as_it_was_typed(monkeypatch, program, begins):
    monkeypatch.setattr("sys.argv", [program, "run", *WORDS])
    assert shlex.split(as_typed()) == [*begins, "run", *WORDS]


def test_commands_of_the_two_sides_have_their_launchers_only_where_there_are_several_ranks(monkeypatch):
    assert shlex.split(mine_command(WORDS)) == ["negpool", "mine", *WORDS]
    assert train_command(["job.toml"], 4) == "torchrun --nproc-per-node=4 -m negpool train job.toml"
    for user, option in ((0, ["--allow-run-as-root"]), (1000, [])):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        assert shlex.split(mine_command(["job.toml"], 2)) == ["mpiexec", "-n", "2", *option, "negpool", "mine", "job.toml"]


def test_a_side_alone_is_told_how_the_other_one_is_started(tmp_path, caplog):
    run = tmp_path / "run"
    jobs = read_job(None, [f"run.folder={run}"])
    caplog.set_level("INFO")
    supervisor = claim_side(run, "launch")
    _tell_absent(jobs, "miner", "never")
    supervisor.release()
    _tell_absent(jobs, "miner", mine_command(["job.toml"]))
    told = f"no miner is at work in {run} yet; it is started by: negpool mine job.toml"
    assert [record.getMessage() for record in caplog.records] == [told]
