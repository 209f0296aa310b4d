"""What the processes of one side must have in common, compared before they work together.

Nodes of a cluster may differ: another checkout, another environment, a folder that only one of them has. Each process says what
it has, rank 0 compares and names the first difference; otherwise it would show hours later, as a hang or a wrong gradient.
"""

import contextlib
import hashlib
import json
import platform
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from launch.jobfile import Jobs
from launch.versions import LIBRARIES, library_version
from trainer.errors import InputError, MachineFailed, exit_code
from trainer.handoff.manifest import write_atomically

PACKAGES = ("gradcache", "trainer", "mining", "launch")
SEEN_WITHIN_S = 10.0  # network file systems remember for some seconds that a file was not there


def agree(
    jobs: Jobs,
    side: Literal["trainer", "miner"],
    speaks: bool,
    gather: Callable[[Any], list[Any] | None],
    broadcast: Callable[[Any], Any],
) -> None:
    """End every process of a side, rank 0 with an InputError, if they differ in what they must share. Collective.

    speaks: whether this is rank 0. gather: returns every rank's value on it. broadcast: returns its value everywhere.
    """
    run = jobs.train.run.folder
    mark, problem = broadcast(_leave_mark(run) if speaks else None)
    if problem is None:
        found = gather({**_of_this_process(jobs, side), "run folder": "seen" if _is_seen(mark) else ""})
        told = difference(found, run, side) if found else None
        problem = broadcast(None if told is None else InputError(told))
        if speaks:
            with contextlib.suppress(OSError):  # a mark that stays disturbs nobody
                mark.unlink(missing_ok=True)
    if problem is not None and speaks:
        raise problem
    if problem is not None:
        raise SystemExit(exit_code(problem))  # one sentence is enough


def difference(found: list[dict[str, str]], run: Path, side: str) -> str | None:
    """Return the sentence for the first thing in which processes differ, or None; found: of each rank, 0 first."""
    first = found[0]
    for other in found:
        if not other["run folder"]:
            return f"{other['host']} does not see {run} as {first['host']} does; set run.folder to a folder that all nodes share"
        if other["problem"]:
            return f"on {other['host']}: {other['problem']}"
        for key in (key for key in first if key != "host" and other[key] != first[key]):
            if key in ("job", "code"):
                what = "reads another job" if key == "job" else "runs other code of negpool"
                return f"{other['host']} {what} than {first['host']}; all ranks of the {side} need the same one"
            return (
                f"{other['host']} has {key} {other[key]}, and {first['host']} has {first[key]}; "
                f"all ranks of the {side} need the same environment"
            )
    return None


def check_mpi_world(size: int, environment: Mapping[str, str], library: str) -> None:
    """Raise InputError where several processes were started and each one is alone in a world of its own.

    That happens when the launcher and the MPI library do not speak the same protocol: the processes start, and exit with 0.
    """
    launchers = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "Open MPI's mpiexec", "PMI_SIZE": "mpiexec"}
    for name, launcher in launchers.items():
        started = int(environment.get(name, "1"))
        if size == 1 and started > 1:
            remedy = (
                f"start it with srun --mpi={mpi_plugin(library) or 'pmix'}, if `srun --mpi=list` has that"
                if launcher == "srun"
                else "start it with the mpiexec of the same MPI that mpi4py was built with"
            )
            raise InputError(f"{launcher} started {started} miners, and each is alone in its MPI world ({library}); {remedy}")


def mpi_plugin(library: str) -> str | None:
    """Return srun's plugin for an MPI library by its name, as mpi4py says it; None for one that is not known."""
    if "open mpi" in library.lower():
        return "pmix"
    return "pmi2" if any(name in library.lower() for name in ("mpich", "intel", "mvapich", "cray")) else None


def _of_this_process(jobs: Jobs, side: str) -> dict[str, str]:
    return {
        "host": socket.gethostname(),
        "problem": _problem_with_model(jobs.train.model.name) if side == "trainer" else "",
        "job": hashlib.sha256(json.dumps(jobs.resolved(), sort_keys=True).encode()).hexdigest(),
        "code": _code_digest(),
        "Python": platform.python_version(),
        **{name: str(library_version(name)) for name in LIBRARIES},
    }


def _problem_with_model(name: str) -> str:
    from trainer.encoder.model import check_model  # seconds, which the miner should not pay

    try:
        check_model(name)
    except InputError as error:
        return str(error)
    return ""


def _code_digest() -> str:
    """Return a digest of all our modules."""
    digest, root = hashlib.sha256(), Path(__file__).parent.parent
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()


def _leave_mark(run: Path) -> tuple[Path, InputError | MachineFailed | None]:
    """Return a file that the others look for, and what is wrong if it cannot be written."""
    mark = run / "status" / f".seen-{secrets.token_hex(8)}"
    try:
        write_atomically(mark, "")
    except (InputError, MachineFailed) as error:
        return mark, error
    return mark, None


def _is_seen(mark: Path) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not mark.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
