"""negpool trains dense retrievers with very large pools of negatives, mined while they train.

`import negpool` gives its public names, listed in launch/python/public.py; a name is imported when it is first used.

The command `negpool` and `python -m negpool` are the two ways in; the second is for launchers, as in
`torchrun --nproc-per-node 2 -m negpool train JOB.toml`. Python, and some launchers once more, put the working folder before
all others then, where a person's own trainer.py or launch.py would be taken for ours: it is taken off before anything of ours
is imported.
"""

import importlib
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.python.public import *  # noqa: F403

HERE = Path(__file__).resolve().parent
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
        _find_our_packages()
        return getattr(importlib.import_module("launch.python.public"), name)

    def __dir__() -> list[str]:
        return sorted(NAMES)


class _Beside:
    """Finds our packages beside this file, whatever modules of their names a notebook's working folder has."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return where one of our packages is, as Python's import asks for it; None for all others."""
        return importlib.util.spec_from_file_location(name, HERE / name / "__init__.py") if name in PACKAGES else None


def _find_our_packages() -> None:
    """Have our packages found beside this file from now on; raises ImportError where another module has such a name already."""
    for name in PACKAGES:
        found = getattr(sys.modules.get(name), "__file__", None)
        if name in sys.modules and found != str(HERE / name / "__init__.py"):
            raise ImportError(f"{found} was imported as {name!r}, which is a package of negpool's; give it another name")
    if _Beside not in sys.meta_path:
        sys.meta_path.insert(0, _Beside)  # type: ignore[arg-type] # a class serves as well as an object


def main() -> None:
    """Run one command and exit with its code; processes that it starts import nothing from the working folder either."""
    os.environ["PYTHONSAFEPATH"] = "1"
    from launch.leave import ctrl_c_in_one_line

    with ctrl_c_in_one_line():
        from launch.__main__ import main as run_command

        run_command()


if __name__ == "__main__":
    sys.path[:] = [folder for folder in sys.path if folder not in ("", os.getcwd())]
    main()
