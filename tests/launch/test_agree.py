"""What ranks must have in common: the sentence for each difference, and real ranks of which one differs."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from launch.agree import agree, check_mpi_world, difference, mpi_plugin
from launch.jobfile import read_job
from tests.ranks import run_ranks
from tests.tiny import write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.errors import InputError

SAME = {"host": "n1", "run folder": "seen", "problem": "", "job": "a", "code": "b", "Python": "3.11.2", "torch": "2.13.0"}
CASES = {
    "n2 does not see runs/x as n1 does; set run.folder to a folder that all nodes share": {"run folder": ""},
    "on n2: model.name='m' is not a model": {"problem": "model.name='m' is not a model"},
    "n2 reads another job than n1; all ranks of the trainer need the same one": {"job": "c"},
    "n2 runs other code of negpool than n1; all ranks of the trainer need the same one": {"code": "c"},
    "n2 has torch 2.6.0, and n1 has 2.13.0; all ranks of the trainer need the same environment": {"torch": "2.6.0"},
}


@pytest.mark.parametrize("sentence", CASES)
def test_a_difference_is_named_with_its_host(sentence):
    other = SAME | {"host": "n2"}
    assert difference([SAME, other], Path("runs/x"), "trainer") is None
    assert difference([SAME, other, other | CASES[sentence]], Path("runs/x"), "trainer") == sentence


def agree_on_rank(rank: int, job: Path) -> str:
    """Agree as a rank; the last one has set another learning rate if it is asked to."""
    world = world_of(rank)
    overrides = ["optim.lr=0.5"] if rank == 2 and (job.parent / "differ").exists() else []
    try:
        agree(read_job(job, overrides), "trainer", world.speaks, world.gather_objects, world.broadcast)
    except (InputError, SystemExit) as error:
        return f"{type(error).__name__} {error}"
    return "agreed"


def test_all_ranks_leave_when_one_differs_and_rank_0_says_why(tmp_path):
    write_tiny_encoder(tmp_path / "encoder")
    job = tmp_path / "job.toml"
    job.write_text(f'[run]\nfolder = "{tmp_path}/run"\n[model]\nname = "{tmp_path}/encoder"\n')
    assert run_ranks(agree_on_rank, 3, job) == ["agreed"] * 3
    assert not list((tmp_path / "run" / "status").iterdir()), "no mark stays"
    (tmp_path / "differ").touch()
    said = run_ranks(agree_on_rank, 3, job)
    host = os.uname().nodename
    assert said[0].startswith(f"InputError {host} reads another job than {host}; all ranks of the trainer")
    assert said[1:] == ["SystemExit 2"] * 2


def agree_on_another_disk(rank: int, job: Path) -> str:
    """Agree as a rank; the last one has a disk of its own where the others have the run folder."""
    if rank == 2:
        clone_newns = 0x00020000  # linux/sched.h
        if ctypes.CDLL(None).unshare(clone_newns):
            return "no namespaces"
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", job.parent / "run"], check=True)
    return agree_on_rank(rank, job)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a disk, which needs root")
def test_a_run_folder_that_one_node_does_not_share_is_named(tmp_path):
    write_tiny_encoder(tmp_path / "encoder")
    job, run = tmp_path / "job.toml", tmp_path / "run"
    job.write_text(f'[run]\nfolder = "{run}"\n[model]\nname = "{tmp_path}/encoder"\n')
    run.mkdir()
    said = run_ranks(agree_on_another_disk, 3, job)
    if said[2] == "no namespaces":
        pytest.skip("this container allows no namespaces")
    assert f"does not see {run} as" in said[0] and "set run.folder to a folder that all nodes share" in said[0]
    assert said[1:] == ["SystemExit 2"] * 2


def test_a_world_of_one_among_several_processes_is_refused():
    check_mpi_world(4, {"SLURM_STEP_NUM_TASKS": "4"}, "Open MPI v5")
    check_mpi_world(1, {"SLURM_STEP_NUM_TASKS": "1"}, "Open MPI v5")
    check_mpi_world(1, {}, "Open MPI v5")
    with pytest.raises(InputError, match=r"srun started 4 miners, and each is alone in its MPI world .*--mpi=pmi2"):
        check_mpi_world(1, {"SLURM_STEP_NUM_TASKS": "4"}, "MPICH Version: 5.0")
    with pytest.raises(InputError, match=r"Open MPI's mpiexec started 2 miners.* the same MPI that mpi4py was built with"):
        check_mpi_world(1, {"OMPI_COMM_WORLD_SIZE": "2"}, "MPICH Version: 5.0")


def test_srun_has_a_plugin_for_each_library():
    assert mpi_plugin("Open MPI v5.0.11, package: Open MPI") == "pmix"
    assert mpi_plugin("MPICH Version: 5.0") == mpi_plugin("Intel(R) MPI Library 2021.9") == "pmi2"
    assert mpi_plugin("LAM") is None
