"""Commands that we show are commands that a shell takes."""

import os
import shlex

import pytest

from launch.recipe import as_typed, mine_command, train_command

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
