"""The command `negpool`, also `python -m launch`: exit codes and error sentences for every command.

0 done; 2 a job or input that cannot be used, one sentence and no traceback; 75 asked to stop, state saved; 1 our own bugs.
"""

import atexit
import gc
import os
import sys
from pathlib import Path
from typing import Any

import typer

from launch.local import TrainerDied
from trainer.errors import InputError
from trainer.handoff.manifest import disk_error, is_disk_full

EXIT_REFUSED, EXIT_STOPPED = 2, 75
# What typer raises for an unknown command or option; it does not export the class, only one derived from it.
USAGE_ERROR: type[Any] = typer.BadParameter.__bases__[0]


def main() -> None:
    """Run one command and exit with its code."""
    # Everything comes from this machine unless the user's environment says otherwise.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # At its end Python searches all that the libraries made for garbage: more than a second, for nothing.
    atexit.register(gc.freeze)
    from launch.commands import app
    from launch.output import keep_output_clean

    keep_output_clean()

    try:
        code = app(standalone_mode=False) or 0
        if "mpi4py.MPI" in sys.modules:
            from mining.ranks import leave_mpi

            leave_mpi(code)
    except InputError as error:
        code = _refuse(str(error))
    except USAGE_ERROR as error:
        error.show()
        code = EXIT_REFUSED
    except (typer.Abort, KeyboardInterrupt):
        code = EXIT_STOPPED
    except TrainerDied as error:
        print(f"negpool: {error}", file=sys.stderr)
        code = 1
    except OSError as error:
        if not is_disk_full(error):
            raise
        code = _refuse(str(disk_error(error, Path(error.filename or "a file"))))
    sys.exit(code)


def _refuse(sentence: str) -> int:
    print(f"negpool: {sentence}", file=sys.stderr)
    return EXIT_REFUSED


if __name__ == "__main__":
    main()
