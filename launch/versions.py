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
        "commit": commit(),
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


def commit() -> str | None:
    """Return the commit of the checkout that this code runs from, with + when it was changed; None outside one."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "-C", here, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
