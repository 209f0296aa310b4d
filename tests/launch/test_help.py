"""What the help shows on eighty columns, and what a shell completes, as typer's own runner and completion have it."""

import importlib.metadata

import pytest
import typer
from typer.testing import CliRunner

from launch.commands import app
from launch.completion import offers
from launch.help import PANELS
from trainer.job import Backend

COMMANDS = typer.main.get_command(app)


def paths(command, before=()):
    """Every command and group below one, as the words that call it."""
    yield before
    for name, below in getattr(command, "commands", {}).items():
        yield from paths(below, (*before, name))


def helped(*words):
    done = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0, done.output
    return done.output


def test_every_command_stands_in_a_panel_and_has_a_short_line():
    listed = [name for names in PANELS.values() for name in names]
    assert set(COMMANDS.commands) <= set(listed)
    shown = helped()
    assert [shown.index(f"─ {panel} ─") for panel in PANELS] == sorted(shown.index(f"─ {panel} ─") for panel in PANELS)
    rows = [line for line in shown.split("─ Train ─")[1].splitlines() if line.startswith("│ ")]
    assert len(rows) == len(COMMANDS.commands), "no line is wrapped"
    assert all(line.rstrip("│ ").endswith(".") for line in rows)


@pytest.mark.parametrize("words", list(paths(COMMANDS)), ids=" ".join)
def test_help_fits_eighty_columns_and_names_no_types_of_python(words):
    shown = helped(*words)
    assert max(map(len, shown.splitlines())) <= 80
    for riddle in ("<bool>", "list[", "<str>", "<path>", "<int"):
        assert riddle not in shown


def test_the_version_is_the_installed_one():
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0 and done.output == f"negpool {importlib.metadata.version('negpool')}\n"


@pytest.mark.parametrize(
    ("incomplete", "earlier", "expected"),
    [
        ("opt", [], ["optim."]),
        ("negatives.fi", [], ["negatives.first_wait_s="]),
        ("sources.mine.wei", [], ["sources.mine.weight="]),
        ("parallel.backend=z", ["data.path=x"], [f"parallel.backend={name}" for name in Backend.__args__]),
        ("data.strict=", [], ["data.strict=true", "data.strict=false"]),
        ("l", ["optim.schedule", "="], ["linear", "cosine", "constant_with_warmup"]),  # bash cuts words there
        ("", ["model.towers"], ["one", "two"]),
        ("optim.lr=", [], []),
        ("nosuch.", [], []),
    ],
)
def test_sections_keys_and_values_are_offered(incomplete, earlier, expected):
    assert [word for word, _ in offers(incomplete, earlier)] == expected


def test_a_shell_gets_them_for_every_command_that_takes_settings():
    for words, sections in (("run job.toml ", 20), ("mine ", 20), ("search model data ", 3), ("data check data ", 1)):
        env = {"_NEGPOOL_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        env["_TYPER_COMPLETE_ARGS"] = f"negpool {words}"
        shown = CliRunner().invoke(app, [], prog_name="negpool", env=env).output
        assert sum(line.split("\t")[0].endswith(".") for line in shown.splitlines()) >= sections, words
        assert "data." in shown
    env["_TYPER_COMPLETE_ARGS"] = "negpool settings "
    assert "precision" in CliRunner().invoke(app, [], prog_name="negpool", env=env).output
