"""Each command, job file and setting that the documentation shows is one that negpool takes."""

import re
from itertools import pairwise

import pytest
import typer

from launch.commands import app
from launch.jobfile import SECTIONS, SOURCES, TABLE, read_job
from launch.settings import all_settings
from tests.docs.pages import PAGES, ROOT, SHELL, blocks, commands, inline, of_negpool, save_example

OVERRIDE = re.compile(rf"({'|'.join(SECTIONS)})(\.\w+)+=.*", re.DOTALL)
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_/.-]*|…")  # a value that a reader replaces
FILE = re.compile(r"\.(py|md|toml|json|jsonl|tsv|npy|parquet|sh|html|log|sbatch|yaml)$")  # run.sh is no setting
SETTINGS = {name: {setting["key"] for setting in about["settings"]} for name, about in all_settings(None).items()}
COMMAND = typer.main.get_command(app)


def parse(args):
    """Let the command line parse what follows `negpool`, as it would to run it; return the words of the last command."""
    command, context = COMMAND, COMMAND.make_context("negpool", list(args))
    while hasattr(command, "commands"):
        name, command, args = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, list(args), parent=context)
    return args


def check_command(words):
    """Raise what the command line or the reader of jobs would, for a command as a block has it."""
    if (args := of_negpool(words)) is None:
        return
    args = parse(args)
    overrides = [word for word in args if OVERRIDE.fullmatch(word)]
    ours = [ROOT / word for word in args if word.endswith(".toml") and word.startswith("launch/")]
    read_job(ours[0] if ours else None, [word for word in overrides if not PLACEHOLDER.fullmatch(word.partition("=")[2])])
    for word in overrides:
        check_name(word.partition("=")[0])


def check_name(name):
    section, *rest = name.split(".")
    known = SETTINGS[section]
    is_parameter = TABLE in rest[:-1]  # of an objective, which the job's reader checks
    assert rest[-1] in known or is_parameter or (section == SOURCES and len(rest) == 1), f"there is no setting {name}"


def check_form(args):
    """Check the names of the command and of its options in a line that shows its form, as in `negpool mine JOB.toml [--once]`."""
    command = COMMAND
    words = [word for part in args for word in re.split(r"[\[\]|,]", part) if word]
    while hasattr(command, "commands") and words and re.fullmatch(r"[a-z]+", words[0]):
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command = command.commands[words.pop(0)]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        known = word.partition("=")[0] in options | {"--help"}
        assert known or not word.startswith("--"), f"there is no option {word}"


def check_page(page, folder):
    """Check all that a page shows; raises AssertionError with the place and the reason. Job files are written into folder."""
    for block in blocks(page):
        try:
            if block.language in SHELL:
                for words in commands(block):
                    check_command(words)
            elif block.language == "toml":
                (folder / "job.toml").write_text(block.text)
                read_job(folder / "job.toml", [])
            elif block.language != "python":
                shown = [line for line in block.text.splitlines() if line.startswith("negpool ") or "-m negpool" in line]
                assert not shown, f"commands stand in a block marked sh or console: {shown[0]}"
        except Exception as error:
            raise AssertionError(f"{block.place}: {error}") from error
    for token in inline(page, "code_inline"):
        try:
            check_inline(token.content.split())
        except AssertionError as error:
            raise AssertionError(f"{page.relative_to(ROOT)}: {token.content}: {error}") from error


def check_inline(words):
    if (args := of_negpool(words)) is not None and words[0] != "import":
        check_form(args)
    for before, word in pairwise(["", *words]):
        section, _, key = word.strip("[]`'\",").partition("=")[0].partition(".")
        name = f"{section}.{key}"
        if section in SECTIONS and re.fullmatch(r"[a-z_]+", key) and not FILE.search(name) and before != "-m":
            check_name(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_negpool_takes_what_a_page_shows(page, tmp_path, monkeypatch):
    if save_example(page, tmp_path) is not None:
        monkeypatch.chdir(tmp_path)
    check_page(page, tmp_path)


WRONG = {
    "No such option: --nosuch": "```sh\nnegpool run JOB.toml --nosuch\n```",
    "No such command 'trane'": "```console\n$ torchrun --nproc-per-node 2 -m negpool trane JOB.toml\nnegpool nosuch\n```",
    "unknown key optim.rate": "```sh\nmpiexec -n 2 negpool mine JOB.toml optim.rate=1\n```",
    "there is no setting optim.rate": "```sh\nnegpool train JOB.toml \\\n  optim.rate=RATE\n```",
    "batch.queries=-1 cannot be used": "```sh\ncd /tmp && negpool train JOB.toml batch.queries=-1\n```",
    "there is no job file": "```bash\nnegpool train launch/jobs/nosuch.toml\n```",
    "Missing parameter": "```sh\nnegpool report\n```",
    "unknown key batch.query": "```toml\n[batch]\nquery = 3\n```",
    "commands stand in a block": "```\nnegpool report RUN\n```",
    "there is no command reprot": "`negpool reprot RUN`",
    "there is no option --nosuch": "`negpool mine JOB.toml [--nosuch]`",
    "there is no setting filter.negative": "Set `filter.negative`.",
    "there is no setting loss.nosuch": "Set `loss.nosuch=each`.",
}


@pytest.mark.parametrize(("said", "text"), WRONG.items(), ids=WRONG)
def test_a_page_that_shows_what_is_not_there_fails(monkeypatch, tmp_path, said, text):
    monkeypatch.setattr("tests.docs.test_commands.ROOT", tmp_path)
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError, match=rf"^page\.md.*{re.escape(said)}"):
        check_page(tmp_path / "page.md", tmp_path)
