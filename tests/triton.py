"""Triton's kernels on the CPU, by its interpreter."""

import contextlib
import importlib
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


def imports_triton(module: str) -> bool:
    """Import a module, and tell whether that has imported Triton, which belongs to the launch of a kernel."""
    importlib.import_module(module)
    return "triton" in sys.modules


@contextlib.contextmanager
def interpreted(module: str) -> Iterator[Callable[..., Any]]:
    """Yield what calls a function in a process where kernels are interpreted: Triton asks for TRITON_INTERPRET when it is
    imported, which others may have done here.

    module: of the test, which must not import it.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which exists for Linux")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("TRITON_INTERPRET", "1")
            imported = pool.submit(imports_triton, module).result()
        assert not imported, "Triton is imported before a kernel is launched"
        yield lambda work, *args: pool.submit(work, *args).result()
