"""What is read of a step's environment, and what an mpiexec inside a job is not told; tests/slurm has the real ones."""

import subprocess

import pytest

from launch.srun import first_host, outside_slurm, port_of, world_of_trainers
from trainer.errors import InputError

TASK = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOBID": "12",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "a3,b1",
    "SLURM_CPUS_PER_TASK": "4",
}
WORLD = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "a3",
    "MASTER_PORT": str(port_of(12, 0, 3)),
    "OMP_NUM_THREADS": "4",
}


def test_a_task_of_several_is_a_rank():
    assert world_of_trainers(TASK) == WORLD
    assert world_of_trainers(TASK | {"MASTER_PORT": "7"})["MASTER_PORT"] == "7", "a person has chosen it"


def test_a_rank_knows_how_many_its_machine_has():
    mixed = TASK | {"SLURM_STEP_TASKS_PER_NODE": "3,5", "SLURM_NODEID": "1"}
    assert world_of_trainers(mixed) == WORLD | {"LOCAL_WORLD_SIZE": "5"}


def test_what_a_launcher_says_goes_before_what_slurm_says():
    for told in ({"RANK": "0"}, {"WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}):
        assert world_of_trainers(TASK | told) == {}
    batch_script = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "a3,b1"}
    assert world_of_trainers(batch_script) == {} == world_of_trainers({})


def test_trainers_that_mpiexec_starts_are_refused():
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        with pytest.raises(InputError, match=r"mpiexec started 2 processes.* know of the others; .* srun, or"):
            world_of_trainers({name: "2"})
        assert world_of_trainers({name: "1"}) == {} == world_of_trainers({name: "2", "RANK": "0"})


def test_starts_of_jobs_near_each_other_and_steps_of_one_meet_at_different_ports():
    ports = {port_of(job, start) for job in range(100, 2000) for start in range(8)}
    assert len(ports) == 1900 * 8 and min(ports) > 1024 and max(ports) < 32768
    assert len({port_of(12, start, step) for start in range(8) for step in range(200)}) == 8 * 200
    assert first_host("n7") == "n7"


def test_an_mpiexec_sees_nothing_of_the_job_that_it_is_in():
    kept = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1", "PMIX_MCA_gds": "hash", "OMPI_MCA_btl": "self", "A": "b"}
    seen = {**TASK, "SLURM_CONF": "x", "PMI_FD": "3", "PMIX_RANK": "5", **kept}
    printed = subprocess.run([*outside_slurm(seen), "/usr/bin/env"], env=seen, capture_output=True, text=True).stdout
    assert dict(line.split("=", 1) for line in printed.splitlines()) == kept
    assert outside_slurm(kept) == [], "outside a job"
