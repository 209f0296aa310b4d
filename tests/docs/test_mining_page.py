"""The page on mining names every argument of sentence-transformers' function with its default, and every option of ours."""

import inspect
import re

from sentence_transformers.util import mine_hard_negatives

from launch.mine_commands import Form
from launch.options import MINING, option_of
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "mining.md").read_text(encoding="utf-8")


def section(title):
    """Return the text below a heading that begins so, up to the next one."""
    return next(part for part in PAGE.split("\n## ") if part.startswith(title))


def first_cells(title):
    return [line.split(" | ")[0] for line in section(title).splitlines() if line.startswith("| ")][2:]


def test_every_argument_of_mine_hard_negatives_is_there_with_its_default():
    theirs = inspect.signature(mine_hard_negatives).parameters
    cells = first_cells("From `mine_hard_negatives`")
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(theirs)
    for cell in cells:
        for name, default in re.findall(r"`(\w+)` \(([^)]+)\)", cell):
            if " " not in default:  # a sentence is no default
                assert default.strip('"') == str(theirs[name].default), cell


def test_every_option_and_form_of_ours_is_in_a_table():
    options = " ".join(first_cells("Which negatives"))
    assert all(option_of(name) in options for name in MINING)
    assert [cell.strip("| `").partition("`")[0] for cell in first_cells("What comes out")] == list(Form)
