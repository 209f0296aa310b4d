"""The command line, behind negpool.py: exit codes and error sentences for every command.

0 done; 2 a job or input that cannot be used; 75 asked to stop, state saved; 78 a run that must not go on as it is; 1 a machine
that failed, or our own bugs. All but bugs are told in one sentence, without a traceback.
"""

import atexit
import gc
import os
import sys
from typing import Any

import typer

from launch.allocator import NVIDIA_DRIVER, allocator_setting
from trainer.errors import EXIT_REFUSED, TOLD, InputError, exit_code
from trainer.handoff.manifest import disk_error, is_disk_error
from trainer.handoff.rights import unreadable

TYPERS_CTRL_C = 130  # what newer versions of typer return for it; older ones raise Abort
# What typer raises for an unknown command or option; it does not export the class, only one derived from it.
USAGE_ERROR: type[Any] = typer.BadParameter.__bases__[0]


def main() -> None:
    """Run one command and exit with its code; Ctrl-C is KeyboardInterrupt."""
    # Everything comes from this machine unless the user's environment says otherwise.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.update(allocator_setting(os.environ, NVIDIA_DRIVER.exists()))
    # At its end Python searches all that the libraries made for garbage: more than a second, for nothing.
    atexit.register(gc.freeze)
    from launch.commands import app
    from launch.output import keep_output_clean

    keep_output_clean()

    try:
        code = app(standalone_mode=False) or 0
        if code == TYPERS_CTRL_C:
            raise KeyboardInterrupt
        if "mpi4py.MPI" in sys.modules:
            from mining.ranks import leave_mpi

            leave_mpi(code)
    except USAGE_ERROR as error:
        error.show()
        code = EXIT_REFUSED
    except typer.Abort:
        raise KeyboardInterrupt from None  # which typer has made of it
    except TOLD as error:
        code = _say(error)
    except Exception as error:
        if not is_disk_error(error):
            raise
        path = getattr(error, "filename", None) or "a file"
        told = unreadable(path)
        code = _say(disk_error(error, path) if told is None else InputError(told))
    sys.exit(code)


def _say(error: Exception) -> int:
    print(f"negpool: {error}", file=sys.stderr)
    return exit_code(error)


if __name__ == "__main__":
    main()
