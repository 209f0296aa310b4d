"""negpool trains dense retrievers with very large pools of negatives, mined while they train.

`import negpool` gives its public names, listed in launch/python/names.py; a name is imported when it is first used.

The command `negpool` and `python -m negpool` are the two ways in; the second is for launchers, as in
`torchrun --nproc-per-node 2 -m negpool train JOB.toml`. Python, and some launchers once more, put the working folder before
all others then, where a person's own trainer.py or launch.py would be taken for ours: it is taken off before anything of ours
is imported.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.python.names import *  # noqa: F403

PACKAGES = ("gradcache", "trainer", "mining", "launch")
NAMES = (
    *("train", "mine_negatives", "evaluate", "encode", "load", "check", "Job", "TrainResult", "MinedNegatives", "Proof"),
    *("NegpoolError", "InputError", "RunInUse", "MustNotGoOn", "MachineFailed", "TrainerDied", "RunStopped"),
)

if not TYPE_CHECKING:  # which would take every name for one of ours
    __all__ = NAMES

    def __getattr__(name: str) -> Any:
        """Return a public name, imported now."""
        if name not in NAMES:
            raise AttributeError(f"module 'negpool' has no attribute {name!r}")
        _take_our_packages()
        return getattr(importlib.import_module("launch.python.names"), name)

    def __dir__() -> list[str]:
        return sorted(NAMES)


def _take_our_packages() -> None:
    """Import the packages that stand beside this file, whatever modules of their names a notebook's working folder has."""
    here = Path(__file__).resolve().parent
    for name in PACKAGES:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, here / name / "__init__.py")
            assert spec is not None and spec.loader is not None
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        elif (found := getattr(sys.modules[name], "__file__", None)) != str(here / name / "__init__.py"):
            raise ImportError(f"{found} was imported as {name!r}, which is a package of negpool's; give it another name")


def main() -> None:
    """Run one command and exit with its code; processes that it starts import nothing from the working folder either."""
    os.environ["PYTHONSAFEPATH"] = "1"
    from launch.__main__ import main as run_command

    run_command()


if __name__ == "__main__":
    sys.path[:] = [folder for folder in sys.path if folder not in ("", os.getcwd())]
    main()
