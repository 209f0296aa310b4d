"""One function on several ranks of this machine, started and answered for: `negpool check` and `negpool bench`.

The parent starts torchrun or mpiexec with a module of ours; its rank 0 writes what came out, or the sentence of a refusal,
to a file, because launchers pass on neither exit codes nor a clean standard error.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.local import die_with_parent, mpi_command
from trainer.errors import InputError

ARGUMENTS, REPORT = "NEGPOOL_ARGUMENTS", "NEGPOOL_REPORT"


def on_ranks(module: str, num_ranks: int, *, mpi: bool = False, **arguments: Any) -> dict[str, Any]:
    """Return what `answer` in a module gives for the arguments on `num_ranks` processes.

    mpi: ranks of an MPI world, as the miner's are, instead of torchrun's.
    Raises InputError for what rank 0 refused; RuntimeError, with the ranks' last words, if they died.
    """
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // num_ranks))),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONSAFEPATH": "1",  # who calls from Python has not set it
            ARGUMENTS: json.dumps(arguments),
            REPORT: str(report),
        }
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        launcher = torchrun if num_ranks > 1 else [sys.executable]  # which a single rank would wait seconds for
        launcher = [*mpi_command(num_ranks), sys.executable] if mpi else launcher
        said = _wait_for([*launcher, "-m", module], environment)
        found = answer_in(report)
    if found is None:
        lines = said.strip().splitlines()
        # torchrun has the last word, and it is about itself.
        words = [line for line in lines if line.startswith("[rank")][-40:] or lines[-40:]
        raise RuntimeError("the ranks died; their last words:\n" + "\n".join(words))
    return found


def answer_in(report: Path) -> dict[str, Any] | None:
    """Return what rank 0 wrote; None where it wrote nothing. Raises InputError for what it refused."""
    if not report.exists():
        return None
    found: dict[str, Any] = json.loads(report.read_text())
    if "refused" in found:
        raise InputError(found["refused"])
    return found


def _wait_for(command: list[str], environment: dict[str, str]) -> str:
    """Return what a launcher and its ranks say; they end with this process, and by Ctrl-C."""
    piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, preexec_fn=die_with_parent, **piped) as launcher:
        try:
            return launcher.communicate()[0].decode(errors="replace")
        except BaseException:
            launcher.terminate()  # killed, it would leave its ranks behind
            raise


def answer(function: Callable[..., dict[str, Any] | None]) -> None:
    """Call a function with the parent's arguments on this rank; rank 0 reports."""
    report = Path(os.environ[REPORT])
    try:
        found = function(**json.loads(os.environ[ARGUMENTS]))
    except InputError as error:
        if os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0":
            report.write_text(json.dumps({"refused": str(error)}))
        return
    if found is not None:
        report.write_text(json.dumps(found))
