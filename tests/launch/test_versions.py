"""Versions: those that were tested satisfy what pyproject.toml asks for, and the oldest of each is read from there."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from launch import versions

ROOT = Path(__file__).parent.parent.parent


def test_tested_versions_satisfy_what_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = [Requirement(words) for each in lists for words in each]
    known = [each for each in asked if each.name in pinned]
    assert {"torch", "transformers", "deepspeed", "packaging"} <= {each.name for each in known}
    for each in known:
        assert each.specifier.contains(pinned[each.name]), f"{each} and {pinned[each.name]}"


def test_the_oldest_version_is_the_one_that_is_asked_for(monkeypatch):
    asked = ["torch>=2.8", "faiss-gpu>=1.15; platform_machine == 'x86_64'", "numpy"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    assert [versions.oldest_supported(name) for name in ("torch", "faiss-gpu", "numpy", "xxhash")] == ["2.8", None, None, None]
    monkeypatch.undo()
    assert versions.oldest_supported("transformers"), "of this installation"
