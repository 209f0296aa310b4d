"""The pages that list commands, extras and figures list those that there are."""

import re
import tomllib

from tests.docs.pages import ROOT, inline
from tests.docs.test_commands import COMMAND


def names(command, before=()):
    """Yield the words of each command that can be called."""
    for name, each in command.commands.items():
        if hasattr(each, "commands"):
            yield from names(each, (*before, name))
        elif not each.hidden:
            yield " ".join(("negpool", *before, name))


def test_every_command_is_in_the_list():
    shown = [token.content for token in inline(ROOT / "docs" / "commands.md", "code_inline")]
    for name in names(COMMAND):
        assert any(re.match(rf"{name}\b", text) for text in shown), name


def test_every_extra_is_in_the_list():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shown = {token.content for token in inline(ROOT / "docs" / "install.md", "code_inline")}
    assert extras.keys() - {"demo"} <= shown


def test_the_readme_is_short_and_its_figures_stand_in_the_results():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    compared = text.partition("## How it compares")[2].partition("\n## ")[0]
    figures = set(re.findall(r"\d+\.\d+(?:e-\d+)?", compared)) - {"6.2", "1.00"}
    results = (ROOT / "docs" / "results.md").read_text()
    assert len(figures) > 10
    assert [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", results)] == []
