"""The documentation as the tests read it: its pages, what stands in their blocks of code, and what they link to."""

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "slurm" / "README.md", *(ROOT / "docs").glob("*.md")])
SHELL = ("sh", "console", "bash")
BETWEEN = {"&&", "||", ";", "|", "&"}  # words of a line of shell behind which another command begins


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def tokens(page: Path) -> list[Token]:
    """Return a page's Markdown, parsed, tables included."""
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def inline(page: Path, kind: str) -> Iterator[Token]:
    """Yield what stands inside of sentences and cells: tokens of `code_inline`, `link_open`, `image`."""
    for token in tokens(page):
        yield from (child for child in token.children or [] if child.type == kind)


def save_example(page: Path, folder: Path) -> str | None:
    """Write the module that a page tells its reader to save into a folder, and return its name; None: it tells nothing."""
    found = re.search(r"save it as `(\w+)\.py`", page.read_text(encoding="utf-8"))
    if found is None:
        return None
    code = next(block.text for block in blocks(page) if block.language == "python")
    (folder / f"{found[1]}.py").write_text(code)
    return found[1]


def blocks(page: Path) -> Iterator[Block]:
    """Yield a page's fenced blocks."""
    for token in tokens(page):
        if token.type == "fence":
            yield Block(page, token.map[0] + 2, token.info.strip(), token.content)


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command of a block; where some lines have the prompt `$`, the others are output."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in lines:
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in BETWEEN:
                words.append(word)
            elif words:
                yield words
                words = []


def of_negpool(words: list[str]) -> list[str] | None:
    """Return what a command says to negpool, behind launchers, too; None where it starts something else."""
    ways = [number for number, word in enumerate(words) if word == "negpool" or word.endswith("/bin/negpool")]
    if not ways or (ways[0] > 0 and words[0] in ("pip", "cd", "source")):
        return None
    return words[ways[0] + 1 :]


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    found = tokens(page)
    texts = [after.content for token, after in itertools.pairwise(found) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}
