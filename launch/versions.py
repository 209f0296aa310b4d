"""What a run was computed with: versions of libraries, interpreter and machine, and the commit."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

from packaging.requirements import Requirement

from trainer.handoff.manifest import write_atomically

LIBRARIES = ("negpool", "torch", "transformers", "accelerate", "deepspeed", "datasets", "numpy", "faiss-cpu", "faiss-gpu",
             "mpi4py")  # fmt: skip


def write_environment(path: Path) -> None:
    """Write the versions as JSON."""
    write_atomically(path, json.dumps(environment(), indent=1))


def environment() -> dict:
    """Return versions of libraries (None: not installed), Python, system, cores and commit."""
    return {
        "libraries": {name: library_version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "commit": _commit(),
    }


def library_version(name: str) -> str | None:
    """Return the version of an installed library, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def oldest_supported(name: str) -> str | None:
    """Return the oldest version of a library that negpool works with, as pyproject.toml has it; None where it says none."""
    try:
        requirements = map(Requirement, importlib.metadata.requires("negpool") or [])
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return None
    bounds = (bound.version for each in requirements if each.name == name and each.marker is None for bound in each.specifier)
    return next(bounds, None)


def code_version() -> tuple[str, bool]:
    """Return the commit of the checkout that this code runs from, else negpool's version, and whether a file of it was changed.

    New files do not count: what a benchmark writes into the checkout changes no code.
    """
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return f"negpool {library_version('negpool')}", False
    return commit, bool(_git("status", "--porcelain", "--untracked-files=no"))


def _commit() -> str | None:
    """Return the commit of the checkout that this code runs from, with + when it was changed; None outside one."""
    commit = _git("rev-parse", "HEAD")
    return None if commit is None else commit + ("+" if _git("status", "--porcelain") else "")


def _git(*words: str) -> str | None:
    """Return what git says about the checkout that this code runs from; None outside one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
