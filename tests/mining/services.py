"""`negpool mine` as real processes that start in a fraction of a second: the ranks of a real mpiexec, or one rank alone.

mpiexec starts a stub of ten lines for each rank. The stub hands its environment to the test, which has the rank itself
forked from a warm server (tests/ranks.py), and dies as the rank dies; a stub that mpiexec kills takes its rank with it.
"""

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w

from launch.local import mpi_command
from tests.ranks import PRELOAD

STUB = """
import json, os, signal, socket, sys
rank = socket.socket(socket.AF_UNIX)
rank.connect(sys.argv[1])
rank.sendall(json.dumps(dict(os.environ)).encode() + b"\\n")
code = int(rank.makefile().readline() or 1)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
# Shared memory alone: looking for networks takes Open MPI a second.
QUICK_MPI = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm", "OMPI_MCA_coll": "basic,libnbc,tuned"}


@dataclass
class Service:
    """A service at work: its ranks, and what they print."""

    out: Path
    ranks: dict[int, multiprocessing.process.BaseProcess] = field(default_factory=dict)
    mpiexec: subprocess.Popen | None = None

    @property
    def said(self) -> str:
        return self.out.read_text()

    def kill(self, *ranks: int) -> None:
        """Send SIGKILL to some ranks, or to all there are; one that has not begun yet is spared."""
        for rank in ranks or list(self.ranks):
            if rank in self.ranks:
                self.ranks[rank].kill()

    def kill_launcher(self) -> None:
        """Send SIGKILL to mpiexec, or to the one rank that goes without."""
        (self.mpiexec or self.ranks[0]).kill()

    def is_alive(self) -> bool:
        return (self.mpiexec is not None and self.mpiexec.poll() is None) or any(rank.is_alive() for rank in self.ranks.values())

    def end(self) -> None:
        """Leave nothing of the service at work."""
        self.kill_launcher()
        self.kill()

    def wait(self, timeout_s: float = 120) -> int:
        """Return the exit code, of mpiexec or of the one rank; 128 and the signal for one that was killed."""
        deadline = time.monotonic() + timeout_s
        while self.is_alive():
            if time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"the service did not end in {timeout_s} s:\n{self.said}")
            time.sleep(0.01)
        code = self.mpiexec.returncode if self.mpiexec else self.ranks[0].exitcode
        return 128 - code if code < 0 else code


def start_service(
    job: dict,
    num_ranks: int = 1,
    words: tuple[str, ...] = ("--once",),
    before: Callable[[int], None] | None = None,
) -> Service:
    """Start `negpool mine` on a job. One rank goes without mpiexec.

    before: a module's function, or a partial of one, that each rank calls before its work.
    """
    place = Path(job["data"]["path"]).parent / f"{Path(job['run']['folder']).name}-{time.monotonic_ns()}"
    file, out = place.with_suffix(".toml"), place.with_suffix(".txt")
    file.write_text(tomli_w.dumps(job))
    out.write_text("")
    context = _warm_server()
    service, argv = Service(out), ["negpool", "mine", str(file), *words]

    def fork(environment: dict[str, str]) -> multiprocessing.process.BaseProcess:
        rank = int(environment.get("OMPI_COMM_WORLD_RANK", 0))
        process = context.Process(target=_rank, args=(argv, environment, str(out), before, rank))
        process.start()
        service.ranks[rank] = process
        return process

    if num_ranks == 1:
        fork(QUICK_MPI)
        return service
    path = f"/tmp/negpool-{os.getpid()}-{time.monotonic_ns()}"  # short: a socket's name has 108 bytes
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def attend(stub: socket.socket) -> None:
        process = fork(json.loads(stub.makefile().readline()))

        def follow() -> None:
            with contextlib.suppress(OSError):
                if stub.recv(1) == b"":
                    process.kill()

        threading.Thread(target=follow, daemon=True).start()
        process.join()
        with contextlib.suppress(OSError):
            stub.sendall(f"{process.exitcode}\n".encode())
            stub.close()

    def accept() -> None:
        for _ in range(num_ranks):
            threading.Thread(target=attend, args=(listener.accept()[0],), daemon=True).start()
        listener.close()
        os.unlink(path)

    threading.Thread(target=accept, daemon=True).start()
    command = [*mpi_command(num_ranks), sys.executable, "-I", "-S", "-c", STUB, path]
    with open(out, "a") as words_of_mpi:
        service.mpiexec = subprocess.Popen(command, env={**os.environ, **QUICK_MPI}, stdout=words_of_mpi, stderr=words_of_mpi)
    return service


@functools.cache
def _warm_server() -> multiprocessing.context.BaseContext:
    """Return the context of the server, which has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    first = context.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()
    return context


def _rank(argv: list[str], environment: dict[str, str], out: str, before: Callable[[int], None] | None, rank: int) -> None:
    """One rank's whole life: the command as a person types it, with the exit code and the words that it gives."""
    os.environ.update(environment, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    handle = os.open(out, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    import torch
    from mpi4py import MPI

    from launch.__main__ import main

    torch.set_num_threads(1)
    if before is not None:
        before(rank)
    sys.argv = argv
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if not MPI.Is_finalized():
            MPI.Finalize()


def die_as_it_begins(phase: str, victims: set[int], rank: int) -> None:
    """Have some ranks end by SIGKILL as a phase begins."""
    from trainer.metrics import NoStatus, Status

    for kind in (Status, NoStatus) if rank in victims else ():

        def update(self, _told=kind.update, **values) -> None:
            _told(self, **values)
            if values.get("phase") == phase:
                os.kill(os.getpid(), signal.SIGKILL)

        kind.update = update


def die_at_a_call(module: str, name: str, number: int, victims: set[int], rank: int) -> None:
    """Have some ranks end by SIGKILL at the n-th call of a method."""
    owner, method = functools.reduce(getattr, name.split(".")[:-1], importlib.import_module(module)), name.split(".")[-1]
    plain, calls = getattr(owner, method), []

    def until_killed(*args, **how):
        calls.append(rank)
        if rank in victims and len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **how)

    setattr(owner, method, until_killed)
