"""The launcher of one node under srun: `srun --ntasks-per-node=1 python -m launch.node RUN/job.toml`.

torchrun's own machinery, told by Slurm's environment which nodes there are, with two changes: signals that ask for a stop reach
the ranks and leave the launcher alone, and the exit code of the rank that ended first is the launcher's.
"""

import contextlib
import os
import signal
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from launch.counted import counted
from launch.imports import lasting_imports
from launch.leave import ctrl_c_in_one_line
from launch.shares import LaunchSettings
from launch.srun import first_host, port_of
from trainer.errors import EXIT_REFUSED, EXIT_STOPPED, InputError


@dataclass(frozen=True)
class Place:
    """Where this node stands among those of its step, and where they meet."""

    job: str  # Slurm's number
    node: int
    num_nodes: int
    num_gpus: int  # of this node that the step may use
    cpus: int  # of this node that the launcher may use
    master: str
    port: int

    @classmethod
    def of_step(cls, environment: Mapping[str, str]) -> "Place":
        """Read the environment of a task of srun's; raises InputError outside one, or where a node has several."""
        try:
            num_nodes, num_tasks = int(environment["SLURM_STEP_NUM_NODES"]), int(environment["SLURM_STEP_NUM_TASKS"])
        except KeyError:
            raise InputError(
                "python -m launch.node is for srun, on the nodes of a Slurm job; on one machine: "
                "torchrun --nproc-per-node 2 -m negpool train JOB.toml"
            ) from None
        if num_tasks != num_nodes:
            raise InputError(
                f"srun started {counted(num_tasks, 'launcher')} on {counted(num_nodes, 'node')}, expected one on each, "
                "which starts the ranks; "
                "set --ntasks-per-node=1"
            )
        return cls(
            job=environment["SLURM_JOB_ID"],
            node=int(environment["SLURM_NODEID"]),
            num_nodes=num_nodes,
            num_gpus=int(environment.get("SLURM_GPUS_ON_NODE", "0")),
            cpus=int(environment.get("SLURM_CPUS_PER_TASK", "0")) or len(os.sched_getaffinity(0)),
            master=first_host(environment["SLURM_STEP_NODELIST"]),
            port=port_of(int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT", "0"))),
        )


def launch_ranks(place: Place, num_ranks: int, command: list[str]) -> int:
    """Start this node's ranks, wait for them, and return 0 or the exit code of the first that failed."""
    # Before the imports, which take seconds. A handler, not SIG_IGN: the ranks would inherit that, and be deaf for as long.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _tell_ranks)
    with lasting_imports():
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, place.cpus // num_ranks)))
    config = LaunchConfig(
        min_nodes=place.num_nodes,
        max_nodes=place.num_nodes,
        nproc_per_node=num_ranks,
        run_id=place.job,
        rdzv_backend="static",
        rdzv_endpoint=f"{place.master}:{place.port}",
        rdzv_configs={"rank": place.node, "timeout": 600},
        max_restarts=0,  # Slurm starts the whole job again, on nodes that live
        signals_to_handle="SIGINT",
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode  # as shells do for signals
    return 0


def _tell_ranks(number: int, frame: FrameType | None) -> None:
    # Where Slurm follows processes by their group, it does not know the ranks, which have one of their own.
    ranks = psutil.Process().children()
    if not ranks:
        sys.exit(EXIT_STOPPED)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def main() -> int:
    """Train a job as one of the nodes of a Slurm step."""
    job, *overrides = sys.argv[1:]
    try:
        place = Place.of_step(os.environ)
        # Not by read_job, which imports all that a job names: seconds, before the ranks spend them, too.
        launch = tomllib.loads(Path(job).read_text()).get("launch", {})
    except (InputError, OSError, tomllib.TOMLDecodeError) as error:
        print(f"negpool: {error}", file=sys.stderr)
        return EXIT_REFUSED
    num_ranks = place.num_gpus or launch.get("train_ranks", LaunchSettings.train_ranks)
    return launch_ranks(place, num_ranks, ["-u", "-m", "negpool", "train", job, *overrides])


if __name__ == "__main__":
    with ctrl_c_in_one_line():
        sys.exit(main())
