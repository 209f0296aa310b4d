"""negpool trains dense retrievers with very large pools of negatives, mined while they train.

The command `negpool` and `python -m negpool` are the two ways in; the second is for launchers, as in
`torchrun --nproc-per-node 2 -m negpool train JOB.toml`. Python, and some launchers once more, put the working folder before
all others then, where a person's own trainer.py or launch.py would be taken for ours: it is taken off before anything of ours
is imported.
"""

import os
import sys


def main() -> None:
    """Run one command and exit with its code; processes that it starts import nothing from the working folder either."""
    os.environ["PYTHONSAFEPATH"] = "1"
    from launch.__main__ import main as run_command

    run_command()


if __name__ == "__main__":
    sys.path[:] = [folder for folder in sys.path if folder not in ("", os.getcwd())]
    main()
