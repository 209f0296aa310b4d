"""One process of one side: `negpool train` and `negpool mine`, alone or started by the supervisor, torchrun or mpiexec."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launch.agree import agree, check_mpi_world
from launch.early import check_early, is_launched
from launch.imports import lasting_imports
from launch.jobfile import Jobs, read_job, refuse_other_job, write_job
from launch.output import start_logging
from launch.srun import world_of_trainers
from launch.versions import write_environment
from trainer.errors import TOLD, InputError, RunInUse
from trainer.handoff.claim import refuse_live
from trainer.handoff.manifest import disk_error, is_disk_error, read_latest
from trainer.handoff.weights import checkpoints_folder

if TYPE_CHECKING:
    from trainer.state import Outcome
    from trainer.world import World

FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"  # how accelerate tells its processes


def train_side(job_file: Path, overrides: list[str], allow_change: bool = False) -> "Outcome | None":
    """Train as this rank of the world that the launcher describes; return the outcome on rank 0."""
    began = time.monotonic()
    os.environ.update(world_of_trainers(os.environ))
    rank = int(os.environ.get("RANK", "0"))
    start_logging(rank)
    stop_without_parent()
    jobs = read_job(job_file, overrides, _launched_backend(os.environ))
    if not is_launched():
        refuse_live(jobs.train.run.folder, "trainer")
        refuse_changed(jobs, allow_change)
        check_early(jobs, mines=False)
    with lasting_imports():
        from trainer.lost_ranks import naming_lost
        from trainer.train import train
        from trainer.world import join_world

    precision, parallel = jobs.train.precision, jobs.train.parallel
    with _telling(jobs, "trainer"):
        world = join_world(precision.encode, precision.tf32, jobs.train.model.compile, parallel.timeout_s)
    try:
        with _telling(jobs, "trainer"), naming_lost(world):
            remarks = settled_by(jobs, world)
            world.decide(lambda: keep_job(jobs, allow_change, remarks))  # after joining: others would wait for one that refuses
            agree(jobs, "trainer", world.speaks, world.gather_objects, world.broadcast)
            outcome = train(jobs.train, world, began)
    finally:
        if sys.exc_info()[0] is None or world.device.type == "cpu":  # NCCL may wait there for ranks that are gone
            world.leave()
    return outcome if world.speaks else None


def _launched_backend(environment: Mapping[str, str]) -> str | None:
    """Return the parallel.backend that the configuration of `accelerate launch` asks for; None where it leaves that open."""
    if environment.get(FSDP, "").lower() == "true":
        if (version := environment.get("FSDP_VERSION", "1")) != "2":
            raise InputError(f"accelerate's configuration asks for version {version} of FSDP; set fsdp_config: fsdp_version: 2")
        return "fsdp2"
    if environment.get(DEEPSPEED, "").lower() == "true":
        return f"zero{environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return None


def mine_side(
    job_file: Path, overrides: list[str], once: bool, checkpoint: str | None, metrics_port: int | None
) -> Literal["finished", "stopped"]:
    """Mine as this rank of the MPI world; the last three as `run_service` takes them."""
    jobs = read_job(job_file, overrides)
    if not is_launched():
        refuse_live(jobs.mine.run.folder, "miner")
        check_early(jobs, trains=False)
    with lasting_imports():
        from mpi4py import MPI

        from mining.service import run_service

    rank = MPI.COMM_WORLD.Get_rank()
    start_logging(rank)
    stop_without_parent()

    with _telling(jobs, "miner"):
        check_mpi_world(MPI.COMM_WORLD.Get_size(), os.environ, MPI.Get_library_version().split(",")[0])
        agree(jobs, "miner", rank == 0, MPI.COMM_WORLD.gather, MPI.COMM_WORLD.bcast)
        return run_service(jobs.mine, MPI.COMM_WORLD, once=once, checkpoint=checkpoint, metrics_port=metrics_port)


def refuse_changed(jobs: Jobs, allow_change: bool) -> None:
    """Raise InputError if the run folder belongs to another job, unless that is allowed."""
    folder = jobs.train.run.folder
    if not allow_change and holds_work(folder):
        refuse_other_job(folder / "job.toml", jobs)


def holds_work(folder: Path) -> bool:
    """Tell whether a run folder belongs to the job in it: something was trained, mined or evaluated, and is kept."""
    from trainer.handoff.negatives import negatives_folder  # brings numpy

    has_version = any(read_latest(place(folder)) for place in (checkpoints_folder, negatives_folder))
    return has_version or any((folder / "evaluations").glob("*.json"))


def settled_by(jobs: Jobs, world: "World") -> dict[str, str]:
    """Return what each "auto" of the job's precisions stands for on the trainers' device, by the setting's name. Collective.

    A miner on another kind of device chooses for itself, and says so.
    """
    from trainer.encoder.auto import device_in_words, encode_on
    from trainer.precision import settled_precision

    precision, encode = settled_precision(jobs.train.precision, world), encode_on(jobs.mine.encode, world.device)
    chosen = {"precision.encode": precision.encode, "precision.products": precision.products}
    chosen |= {"encode.dtype": encode.dtype, "encode.stored": encode.stored}
    asked = jobs.resolved()
    return {
        name: f"{value} on {device_in_words(world.device)}"
        for name, value in chosen.items()
        if asked[name.partition(".")[0]][name.partition(".")[2]] != value
    }


def keep_job(jobs: Jobs, allow_change: bool = False, remarks: Mapping[str, str] | None = None) -> None:
    """Keep the resolved job, with remarks, and the versions of libraries in the run folder; refuse the folder of another job."""
    folder = jobs.train.run.folder
    refuse_changed(jobs, allow_change)
    write_job(folder / "job.toml", jobs, remarks)
    write_environment(folder / "environment.json")


@contextlib.contextmanager
def _telling(jobs: Jobs, side: str) -> Iterator[None]:
    """Leave the phase and the sentence of an end where supervisors find them: launchers hide exit codes."""
    from trainer.metrics import write_end

    run = jobs.train.run.folder
    try:
        yield
    except RunInUse:
        raise  # the status file is the other one's
    except TOLD as error:
        write_end(run, side, error)
        raise
    except Exception as error:
        if not is_disk_error(error):
            raise
        told = disk_error(error, getattr(error, "filename", None) or run)
        write_end(run, side, told)
        raise told from error


def stop_without_parent() -> None:
    """Save and leave when the launcher that started this process is gone, so that no orphan holds the run."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    # A process that a person starts may outlive its shell on purpose (nohup); a launcher's rank may not.
    if "TORCHELASTIC_RUN_ID" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ:
        threading.Thread(target=watch, daemon=True).start()
