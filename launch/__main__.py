"""The command `negpool`, also `python -m launch`: exit codes and error sentences for every command.

0 done; 2 a job or input that cannot be used, one sentence and no traceback; 75 asked to stop, state saved; 1 our own bugs.
"""

import errno
import os
import sys

import click

from trainer.errors import InputError

EXIT_REFUSED, EXIT_STOPPED = 2, 75


def main() -> None:
    """Run one command and exit with its code."""
    # Everything comes from this machine unless the user's environment says otherwise.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from launch.commands import app

    try:
        code = app(standalone_mode=False)
    except InputError as error:
        code = _refuse(str(error))
    except click.ClickException as error:
        error.show()
        code = EXIT_REFUSED
    except (click.Abort, KeyboardInterrupt):
        code = EXIT_STOPPED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        code = _refuse(f"no room left on the disk for {error.filename or 'a file'}; free some space or set run.folder")
    sys.exit(code or 0)


def _refuse(sentence: str) -> int:
    print(f"negpool: {sentence}", file=sys.stderr)
    return EXIT_REFUSED


if __name__ == "__main__":
    main()
