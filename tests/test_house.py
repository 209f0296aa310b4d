"""The direction of imports, and that the packages are ours and not their namesakes on PyPI."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["launch", "gradcache", "trainer", "mining"]
# What a package may import of the others; a name covers all below it.
ALLOWED = {
    "gradcache": [],
    "trainer": ["gradcache"],
    "mining": [
        f"trainer.{part}"
        for part in ("errors", "ranges", "encoder", "data", "handoff", "world", "metrics", "interrupt", "warned")
    ],
    "launch": ["gradcache", "trainer", "mining"],
}


def imports_of(file: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package):
    allowed = [package, *ALLOWED[package]]
    for file in (ROOT / package).rglob("*.py"):
        for name in imports_of(file):
            if name.split(".")[0] in PACKAGES:
                assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{file} imports {name}"


def test_gradcache_needs_torch_alone():
    known = {"torch", "gradcache"}
    for file in (ROOT / "gradcache").rglob("*.py"):
        third_party = {n.split(".")[0] for n in imports_of(file)} - known
        if file.name == "kernels.py":  # imported where a kernel is launched, alone
            third_party -= {"triton"}
        assert third_party <= sys.stdlib_module_names, (file, third_party)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_are_ours(package):
    assert Path(importlib.import_module(package).__file__).parent == ROOT / package


@pytest.mark.parametrize("package", ["launch", "trainer", "mining"])
def test_init_files_are_empty(package):
    for file in (ROOT / package).rglob("__init__.py"):
        assert file.read_text() == "", file
