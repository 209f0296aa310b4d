"""Tests marked `gpu` run where torch sees one."""

import logging
import os
import sys
from pathlib import Path

import pytest
import torch

import mining.ranks

# One place for the operator that DeepSpeed builds, whatever cache a test gives its commands: building takes a minute.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """Take away what a command called in this process logs with: it would write to another test's closed output."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _mpi_stays(monkeypatch):
    """Keep a command that is called in this process from ending MPI, which other tests here go on with."""
    monkeypatch.setattr(mining.ranks, "leave_mpi", lambda code: None)


@pytest.fixture(autouse=True, scope="module")
def _environment_as_it_was():
    """Give the next file the environment that this one got: a rank's place left there would make later tests look for others."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
