"""Some of the commands that pages show, run as they stand there: their placeholders become a tiny model and a tiny data set."""

import csv
import json
import shlex

import pytest

from launch.commands import app
from tests.docs.pages import ROOT, SHELL, blocks, commands, inline, of_negpool
from tests.tiny import write_tiny_dataset, write_tiny_encoder

# A page, and commands of it that run one after the other in one folder. Runs of both sides are left to tests/system.
STORIES = [
    (
        "README.md",
        [
            "negpool data check my.csv",
            "negpool data split my.csv data/mine",
            "negpool init data/mine",
            "negpool run mine.toml --dry-run",
        ],
    ),
    ("docs/commands.md", ["negpool settings"]),
    ("docs/commands.md", ["negpool settings SECTION"]),
    ("docs/commands.md", ["negpool data check DATA"]),
    ("docs/commands.md", ["negpool data convert DATA OUT --form beir"]),
    ("docs/commands.md", ["negpool data filter DATA --model MODEL --out OUT"]),
    ("docs/commands.md", ["negpool eval MODEL DATA"]),
    ("docs/commands.md", ['negpool search MODEL DATA "words"']),
    ("docs/commands.md", ["negpool encode MODEL FILE --out OUT.npy"]),
    ("docs/commands.md", ["negpool mine --model MODEL --data DATA --out OUT.jsonl"]),
    ("docs/commands.md", ["negpool merge OUT MODEL MODEL"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder")
    (folder / "texts.txt").write_text("sort a list\nread a file by lines\n")
    return folder


def write_pairs(data, file):
    """Write a data set's queries as a person's table of questions and answers."""
    lines = [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([("query", "positive"), *((f"what is {line['_id']}", line["text"]) for line in lines)])


def is_shown(page, command):
    """Whether a page has a command, in a block or in a sentence."""
    wanted = shlex.split(command)
    in_blocks = (words for block in blocks(page) if block.language in SHELL for words in commands(block))
    in_sentences = (shlex.split(token.content) for token in inline(page, "code_inline") if token.content.startswith("negpool "))
    return wanted in in_blocks or wanted in in_sentences


@pytest.mark.parametrize(("page", "story"), STORIES, ids=[f"{page}: {story[0]}" for page, story in STORIES])
def test_commands_of_a_page_run(page, story, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.chdir(tmp_path)
    write_pairs(folder / "data", tmp_path / "my.csv")
    names = {"DATA": folder / "data", "MODEL": folder / "encoder", "FILE": folder / "texts.txt", "SECTION": "filter"}
    for command in story:
        assert is_shown(ROOT / page, command), f"{page} does not show {command}"
        words = [str(names.get(word, word)) for word in of_negpool(shlex.split(command))]
        assert app(words, standalone_mode=False) == 0
        printed = capsys.readouterr()
        assert printed.out or printed.err
        assert all((tmp_path / word).exists() for word in words if word.startswith("OUT"))
