"""What Slurm tells the processes that it starts: their place in a step, and what an mpiexec inside a job must not be told."""

import os
import re
import subprocess
from collections.abc import Mapping

from trainer.errors import InputError

FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below those that systems hand out by themselves
STARTS_OF_A_JOB = 8  # with ports of their own, before they meet those of other jobs
BETWEEN_STEPS = 8 * 1009  # ports, so that steps at work in one job at the same time meet at different ones
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what torchrun, accelerate and deepspeed set
KEPT = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")  # which trainer/handoff/claim.py reads, and no MPI library does


def world_of_trainers(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what torchrun would have set, for one of several tasks of srun's; nothing where a launcher has, or for one task.

    A step of several components (`srun a : b`) is one world, as Slurm numbers its tasks.
    Raises InputError for one of several processes of an mpiexec, which would train each in a world of its own.
    """
    if any(name in environment for name in LAUNCHED):
        return {}
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if num_tasks > 1:
        job, restarts = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT", "0"))
        on_node = tasks_of_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""), int(environment.get("SLURM_NODEID", "0")))
        return {
            "RANK": environment["SLURM_PROCID"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "WORLD_SIZE": str(num_tasks),
            **({} if on_node is None else {"LOCAL_WORLD_SIZE": str(on_node)}),
            "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": environment.get("MASTER_PORT") or str(port_of(job, restarts, int(environment["SLURM_STEP_ID"]))),
            "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS") or environment.get("SLURM_CPUS_PER_TASK", "1"),
        }
    started = max(int(environment.get(name, "1")) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    if started > 1:
        raise InputError(
            f"mpiexec started {started} processes, and none of them would know of the others; ranks that train or evaluate are "
            f"started by srun, or by torchrun --nproc-per-node {started} -m negpool"
        )
    return {}


def tasks_of_node(counts: str, node: int) -> int | None:
    """Return how many tasks a node of a step has, by Slurm's short form, such as 2(x3),1; None if it does not say."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    of_nodes = [int(count) for count, times in found for _ in range(int(times or 1))]
    return of_nodes[node] if node < len(of_nodes) else None


def port_of(job: int, restarts: int, step: int = 0) -> int:
    """Return the port where a job's ranks meet: another one for each job near it, for each start of it and each of its steps.

    Jobs may share a node, and a launcher that outlived its node's loss may still listen.
    """
    return FIRST_PORT + (job * STARTS_OF_A_JOB + restarts % STARTS_OF_A_JOB + step * BETWEEN_STEPS) % NUM_PORTS


def first_host(nodes: str) -> str:
    """Return the first name of a list in Slurm's short form, such as n[1-4]."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return names.stdout.split()[0]


def outside_slurm(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the words before a command that is to work on this machine alone; none outside a job of Slurm's.

    An mpiexec that finds itself in a job spreads its ranks over the job's nodes, or joins the step that it was started in.
    """
    names = [name for name in environment if name.startswith(("SLURM", "PMI_", "PMIX_")) and not name.startswith("PMIX_MCA_")]
    unset = [word for name in sorted(names) if name not in KEPT for word in ("-u", name)]
    return ["env", *unset] if unset else []
