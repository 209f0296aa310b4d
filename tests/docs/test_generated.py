"""What pages say of the code is what the code says."""

import re
import runpy

from launch.settings import all_settings
from tests.docs.pages import ROOT, tokens

GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))


def test_generated_pages_are_those_of_the_code():
    for path, text in GENERATE["pages"]().items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is out of date; run: python docs/generate.py"


def first_cells(page):
    """The first cell of each row of a page's tables, by the heading above."""
    found, heading, cell = {}, "", -1
    for token in tokens(ROOT / "docs" / page):
        if token.type == "heading_open":
            cell = None
        elif token.type == "inline" and cell is None:
            heading, cell = token.content, -1
        elif token.type == "tr_open":
            cell = 0
        elif token.type == "inline" and cell == 0:
            found.setdefault(heading, []).append(token.content.strip("`"))
            cell = -1
    return found


def test_every_setting_is_in_the_reference_once():
    listed = first_cells("settings.md")
    for section, about in all_settings(None).items():
        keys = [setting["key"] for setting in about["settings"]]
        shown = [re.match(r"\w+", cell)[0] for cell in listed["sources.NAME" if section == "sources" else section]]
        assert shown == ["key", *keys]
    assert sum(map(len, listed.values())) > 150


def test_every_source_file_is_in_the_map_once_with_a_line():
    listed = first_cells("architecture.md")
    for package in ("gradcache", "trainer", "mining", "launch"):
        for file in (ROOT / package).rglob("*.py"):
            if file.read_text():
                folder = f"{file.parent.relative_to(ROOT)}/"
                assert listed[folder].count(file.name) == 1, file
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert "|  |" not in text.partition("## The map")[2], "a file has no docstring"
