"""Commands as a person types them: the one that goes on, and those that start the sides of a run in two shells."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

AS_ROOT = ["--allow-run-as-root"]  # without it Open MPI starts nothing for root, as in most containers


def as_typed() -> str:
    """Return the command line of this process as a shell takes it again."""
    program = "negpool" if Path(sys.argv[0]).name == "negpool" else "python -m negpool"
    return shlex.join([*program.split(), *sys.argv[1:]])


def train_command(words: Sequence[str], num_ranks: int = 1) -> str:
    """Return what starts the trainer; words: the job file and overrides."""
    torchrun = ["torchrun", f"--nproc-per-node={num_ranks}", "-m"] if num_ranks > 1 else []
    return shlex.join([*torchrun, "negpool", "train", *words])


def mine_command(words: Sequence[str], num_ranks: int = 1) -> str:
    """Return what starts the miner, for the person who is at work here."""
    mpiexec = ["mpiexec", "-n", str(num_ranks), *(AS_ROOT if os.geteuid() == 0 else [])] if num_ranks > 1 else []
    return shlex.join([*mpiexec, "negpool", "mine", *words])


def two_shells(job: str = "JOB.toml") -> str:
    """Return the recipe as paragraphs for a command's help."""
    return "\n\n".join(
        [
            "The two sides by hand, each in its own shell, on one machine or on two that share run.folder:",
            f"trainer: {train_command([job])}, on several ranks {train_command([job], 2)}",
            f"miner: {mine_command([job])}, on several ranks {mine_command([job], 2)}",
            "Either may be stopped and started again at any time; they meet in run.folder.",
        ]
    )
