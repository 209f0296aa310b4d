"""The site is made from the pages without a warning, and what pages name is there."""

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser

import pytest
from sphinx.cmd.build import build_main

from tests.docs.pages import PAGES, ROOT, headings, inline

# MyST uses names that Sphinx will take away in a later version.
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
SOURCES = ("gradcache", "trainer", "mining", "launch", "slurm", "docs", "tests")


def build(source, out) -> tuple[int, str]:
    """Make a site as CONTRIBUTING.md says; return the exit code and what was printed."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = build_main(["-W", "--keep-going", "-n", "-q", "--no-color", str(source), str(out)])
    return code, said.getvalue()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    code, said = build(ROOT / "docs", out)
    assert code == 0, said
    return out


class Sources(HTMLParser):
    """What a page loads when it is opened."""

    def __init__(self):
        super().__init__()
        self.loaded = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") == "stylesheet":
            self.loaded.append(given["href"])


def test_each_page_becomes_one_of_the_site_that_needs_no_network(site):
    for page in (ROOT / "docs").glob("*.md"):
        html = (site / f"{page.stem}.html").read_text(encoding="utf-8")
        found = Sources()
        found.feed(html)
        assert found.loaded
        for source in found.loaded:
            assert "//" not in source and (site / source.partition("?")[0]).is_file(), (page, source)


def test_each_page_is_in_the_navigation(site):
    found = re.findall(r'class="reference internal" href="([^"#]+)"', (site / "index.html").read_text(encoding="utf-8"))
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= {name.removesuffix(".html") for name in found}


def test_a_link_to_nothing_fails_the_build(tmp_path):
    (tmp_path / "conf.py").write_text((ROOT / "docs" / "conf.py").read_text().replace('"site.css"', ""))
    (tmp_path / "settings.md").write_text("# Settings\n")
    (tmp_path / "index.md").write_text("# One\n\n[there](settings.md), [here](#one)\n\n```{toctree}\nsettings\n```\n")
    assert build(tmp_path, tmp_path / "right") == (0, "")
    wrong = ["nosuch.md", "settings.md#nosuch", "#nosuch", "../nosuch.py"]
    with (tmp_path / "index.md").open("a") as file:
        file.writelines(f"\n[nowhere]({target})\n" for target in wrong)
    code, said = build(tmp_path, tmp_path / "wrong")
    assert code != 0 and said.count("WARNING") == len(wrong), said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_file_names_of_a_page_are_there(page):
    links = [token.attrs["href"] for token in inline(page, "link_open")] + [token.attrs["src"] for token in inline(page, "image")]
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{page}: {link} is not there"
        assert not anchor or anchor in headings(target), f"{page}: {link} has no such heading"
    for token in inline(page, "code_inline"):
        name = token.content.partition("::")[0].partition(" ")[0]
        if name.startswith(tuple(f"{folder}/" for folder in SOURCES)) and re.fullmatch(r"[\w./-]+", name):
            assert (ROOT / name).exists(), f"{page}: {name} is not there"
