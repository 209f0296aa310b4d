"""What doctor says of this machine is complete, and what is wrong is found with its remedy."""

import json
import os
import stat
import subprocess
import sys

import pytest

from launch import doctor
from launch.early import mpiexec_path
from launch.local import mpi_command
from tests.system.test_commands import call


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_a_machine_without_slurm_and_gpu_is_told_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_run", lambda *words: "Open MPI 5" if "--version" in words else "")
    found = doctor.examine(tmp_path / "runs")
    names = [line["name"] for line in found["findings"]]
    assert {"machine", "Python", "torch", "GPU", "NCCL", "FAISS build", "MPI library", "mpiexec", "Slurm"} < set(names)
    assert found["ok"] and len(names) == len(set(names)) and names[-1] == f"folder {tmp_path / 'runs'}"
    assert all(line["found"] for line in found["findings"])
    assert not list((tmp_path / "runs").iterdir()), "nothing is left"


def test_an_mpiexec_of_another_mpi_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "_run", lambda *words: "HYDRA build details:\n    Version: 4.3")
    finding = by_name(doctor._mpi(doctor._mpi_world()))["mpiexec"]
    assert finding.verdict == "wrong" and "HYDRA" in finding.found and "rebuild" in finding.remedy


def test_root_is_told_what_open_mpi_wants_of_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(doctor, "_run", lambda *words: "mpiexec (Open MPI) 5.0")
    for name in doctor.MPI_AS_ROOT:
        monkeypatch.delenv(name, raising=False)
    remedy = by_name(doctor._mpi(doctor._mpi_world()))["mpiexec as root"].remedy
    assert remedy == "add --allow-run-as-root, or set OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    for name in doctor.MPI_AS_ROOT:
        monkeypatch.setenv(name, "1")
    assert "mpiexec as root" not in by_name(doctor._mpi(doctor._mpi_world()))
    subprocess.run([mpiexec_path(), "-n", "1", "true"], check=True)  # Open MPI's own opinion, where this is root


def test_a_missing_library_has_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("datasets", "peft") else "1.0")
    found = by_name(doctor._libraries())
    assert (found["datasets"].verdict, found["datasets"].remedy) == ("missing", "pip install datasets")
    assert (found["peft"].verdict, found["peft"].remedy) == ("absent", "pip install 'negpool[lora]'")


def test_a_library_that_is_too_old_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "2.7.1+cu126" if name == "torch" else None)
    monkeypatch.setattr(doctor, "oldest_supported", {"torch": "2.8"}.get)
    found = by_name(doctor._libraries())["torch"]
    assert (found.verdict, found.remedy) == ("wrong", "pip install --upgrade 'torch>=2.8'")
    assert found.found == "2.7.1+cu126 is too old: negpool needs 2.8 or newer"
    monkeypatch.setattr(doctor, "_version", lambda name: "2.10.0")  # which a comparison of texts would call older
    assert by_name(doctor._libraries())["torch"].verdict == "ok"


CPU_AND_GPU = {"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.0"}


class Build:
    """A FAISS as Python imports it."""

    __version__ = "1.15.1"

    def get_compile_options(self):
        return "AVX2 "


class GpuBuild(Build):
    StandardGpuResources = object

    def get_num_gpus(self):
        return 0


@pytest.mark.parametrize(
    "installed, imported, verdict, said",
    [
        ({}, None, "absent", "exact search does without"),
        ({"faiss-cpu": "1.15.1"}, Build(), "ok", "1.15.1, AVX2, sees 0 GPUs"),
        ({"faiss-gpu": "1.15.1.post1"}, GpuBuild(), "ok", "1.15.1, AVX2, sees 0 GPUs"),
        (CPU_AND_GPU, Build(), "wrong", "faiss-cpu 1.15.1 and faiss-gpu 1.15.0 are installed and own the same files"),
        ({"faiss-gpu": "1.15.1"}, Build(), "wrong", "faiss-gpu 1.15.1 is installed, and what is imported has no GPU code"),
        ({"faiss-cpu": "1.14.0"}, Build(), "wrong", "faiss-cpu 1.14.0 is installed, and what is imported is 1.15.1"),
        ({"faiss-cpu": "1.15.1"}, None, "wrong", "faiss-cpu 1.15.1 is installed and cannot be used"),
        ({"faiss-cpu": "1.15.1"}, object(), "wrong", "faiss-cpu 1.15.1 is installed and cannot be used"),
    ],
)
def test_a_faiss_that_is_half_of_another_is_wrong(monkeypatch, installed, imported, verdict, said):
    monkeypatch.setattr(doctor, "_version", installed.get)
    monkeypatch.setitem(sys.modules, "faiss", imported)
    finding = doctor._faiss()
    assert finding.verdict == verdict and said in finding.found, finding
    if verdict == "wrong":
        extra = "faiss-gpu" if "faiss-gpu" in installed else "faiss"
        assert finding.remedy == f"pip uninstall -y faiss-cpu faiss-gpu faiss-gpu-cuvs; pip install 'negpool[{extra}]'"


def test_a_slurm_without_a_controller_is_not_taken_for_one(monkeypatch, tmp_path):
    for name in ("sbatch", "sinfo", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho error: no controller >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [(finding.name, finding.verdict) for finding in doctor._slurm()] == [("Slurm", "absent")]


def test_a_folder_without_rename_or_locks_is_wrong(tmp_path, monkeypatch):
    assert doctor._folder(tmp_path).verdict == "ok"
    monkeypatch.setattr(doctor, "_second_lock_waits", lambda path: False)
    found = doctor._folder(tmp_path)
    assert found.verdict == "absent" and "two processes can hold one lock" in found.found and "nothing is torn" in found.found
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_wrong(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert doctor._folder(tmp_path / "runs").verdict == "wrong"


def test_two_ranks_look_at_the_folder_from_both(tmp_path):
    words = call(tmp_path, "doctor", "--folder", tmp_path / "runs", "--json", launcher=mpi_command(2))[0]
    found = {line["name"]: line for line in json.loads(words)["findings"]}
    assert found["folder on all nodes"]["verdict"] == "ok" and "2 ranks" in found["folder on all nodes"]["found"]
    assert found["locks on all nodes"]["verdict"] == "ok"


LATE_RANK = """
import sys, time
from pathlib import Path
from mpi4py import MPI
from launch import doctor

look, world = doctor._wait_for, MPI.COMM_WORLD
if world.Get_rank() == 0:
    doctor._wait_for = lambda unseen: time.sleep(1) or look(unseen)
print(doctor._on_all_nodes(world, Path(sys.argv[1])).verdict)
"""


def test_a_rank_that_looks_late_sees_the_files_of_all(tmp_path):
    command = [*mpi_command(2), sys.executable, "-c", LATE_RANK, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.split() == ["ok", "ok"]
    assert not list(tmp_path.iterdir())


BROKEN_LOCKS = """
import sys
from pathlib import Path
import filelock
from mpi4py import MPI
from launch import doctor

world, own = MPI.COMM_WORLD, filelock.FileLock

def refuse(path):
    raise OSError(37, "No locks available")

if world.Get_rank() == 1:  # as a mount that locks within its node alone
    filelock.FileLock = lambda path: own(f"{path}.of-this-node")
finding = doctor._locks_on_all_nodes(world, Path(sys.argv[1]))
filelock.FileLock = own
if world.Get_rank() == 0:
    own.acquire = lambda self, timeout: refuse(self)
none = doctor._locks_on_all_nodes(world, Path(sys.argv[1]))
if world.Get_rank() == 1:
    print(finding.verdict, finding.found, finding.remedy, sep="|")
    print(none.verdict, none.found, none.remedy, sep="|")
"""


def test_locks_that_other_nodes_do_not_see_are_told_with_what_follows(tmp_path):
    command = [*mpi_command(2), sys.executable, "-c", BROKEN_LOCKS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen, none = (line.split("|") for line in done.stdout.splitlines())
    assert seen[0] == none[0] == "absent"
    assert "held a lock in" in seen[1] and "got, too; nothing is torn by it, but each makes the same tables" in seen[1]
    assert "takes no locks ([Errno 37] No locks available); nothing is torn by it" in none[1]
    assert seen[2] == none[2] and "negpool data prepare JOB.toml" in seen[2]
    assert not (tmp_path / ".doctor-lock").exists()
