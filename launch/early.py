"""What can be known of a job before torch is loaded: packages, names of models, files of data and their splits.

Everything is checked in the process that a person starts, so a wrong job ends within a second; ranks that a launcher starts
find the rest themselves.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape

from launch.jobfile import Jobs
from launch.output import messages
from launch.srun import LAUNCHED
from mining.job import MineJob
from mining.settings import AUTO, EXACT
from trainer.encoder.source import refuse_no_name
from trainer.errors import InputError
from trainer.fits import check_splits, check_steps
from trainer.handoff.settings import places_of
from trainer.job import TrainJob
from trainer.trackers import check_trackers

NAMES = {"faiss": "FAISS", "deepspeed": "DeepSpeed", "peft": "PEFT"}  # of packages, as people write them
MPI_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # what Open MPI and MPICH tell each rank


def check_early(jobs: Jobs, trains: bool = True, mines: bool = True) -> None:
    """Raise InputError for a job that cannot run on this machine, as far as names, files and packages tell. Writes nothing.

    trains, mines: which sides the job is for.
    """
    for remark in jobs.remarks:
        messages().print(f"[yellow]{escape(remark)}; the job's value holds[/yellow]")
    needs = [*(_needs_of_trainer(jobs.train) if trains else ()), *(_needs_of_miner(jobs.mine) if mines else ())]
    for setting, module, extra in needs:
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"{setting} needs {NAMES.get(module, module)}, which is not installed; run: pip install 'negpool[{extra}]'"
            )
    if trains:
        check_trackers(jobs.train.run.trackers)
        if jobs.train.optim.steps is not None:
            check_steps(jobs.train, jobs.train.optim.steps)
        refuse_no_name(jobs.train.model.name)
    if mines and jobs.mine.rerank.model:
        refuse_no_name(jobs.mine.rerank.model, "rerank.model")
    _check_data(jobs.train)


def mpiexec_path() -> str:
    """Return the program that starts MPI processes; raises InputError where there is none."""
    beside = Path(sys.executable).parent / "mpiexec"  # the PyPI wheel puts it there
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise InputError("no mpiexec found for the miner; install one: pip install 'negpool[mpi]'")
    return found


def is_launched() -> bool:
    """Tell whether a launcher has started this process as a rank of its own."""
    # Slurm tells a person's own shell, too, that it is the only task of a step.
    return any(name in os.environ for name in (*LAUNCHED, *MPI_LAUNCHED)) or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def _needs_of_trainer(job: TrainJob) -> Iterator[tuple[str, str, str]]:
    """Yield the settings that need a package of their own, its module, and our extra that brings it."""
    if job.parallel.backend.startswith("zero"):
        yield f'parallel.backend="{job.parallel.backend}"', "deepspeed", "deepspeed"
    if job.model.lora_rank:
        yield f"model.lora_rank={job.model.lora_rank}", "peft", "lora"
    if job.model.quantize is not None:
        yield f'model.quantize="{job.model.quantize}"', "bitsandbytes", "qlora"


def _needs_of_miner(job: MineJob) -> Iterator[tuple[str, str, str]]:
    if job.index.factory not in (EXACT, AUTO):
        yield f"index.factory={job.index.factory!r}", "faiss", "faiss"


def _check_data(job: TrainJob) -> None:
    """Raise InputError for data that is not there, or lacks a split that the job needs, as the names of its files say."""
    from trainer.data.forms import find_source  # brings pyarrow, a fifth of a second

    places = places_of(job.data, job.sources)
    splits = {split for path, columns in places for split in find_source(path, columns).splits}
    check_splits(job, splits, " and ".join(str(path) for path, _ in places))
