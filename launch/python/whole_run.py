"""`negpool.train`: a whole run, as `negpool run` does it, from a notebook or a script.

Trainer and miner are processes of their own, so that a notebook needs no guard and keeps its memory. The call waits for them.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from launch.early import check_early, mpiexec_path
from launch.output import messages
from launch.python.in_memory import Data, Model
from launch.python.result import TrainResult
from launch.python.whole_job import Job, JobLike
from trainer.handoff.settings import NegativesSettings
from trainer.interrupt import handlers_kept


class Evaluator(Protocol):
    """An evaluator of sentence-transformers, or what is called like one."""

    def __call__(self, model: Any, /) -> Any:
        """Return one figure, or figures by name."""


class RunStopped(KeyboardInterrupt):
    """The run was asked to stop, and is saved; the message says how it goes on."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


def train(
    model: "Model | Mapping[str, Any] | None" = None,
    data: "Data | Mapping[str, Any] | None" = None,
    *,
    job: "JobLike | None" = None,
    evaluator: Evaluator | None = None,
    mine: bool = True,
    allow_change: bool = False,
    **settings: object,
) -> TrainResult:
    """Train a model, mine hard negatives meanwhile, and return the finished run; the same call goes on with a stopped one.

    model: a name, a folder, or a SentenceTransformer, which stays as it is.
    data: a path, a name of the hub, a Dataset or DatasetDict, a list of records, or (queries, corpus, qrels) as dictionaries.
    job: a job file, or a `Job`. settings: sections as dictionaries, `optim={"lr": 2e-5}`, or keys, `**{"optim.lr": 2e-5}`.
    evaluator: called with the trained model at the end. mine: without, training has in-batch and given negatives only.
    allow_change: go on in the folder of another job.
    Raises RunStopped at Ctrl-C, and a NegpoolError for what `negpool run` refuses.
    """
    whole = Job(model, data, job=job, **settings)
    if not mine and whole.train.negatives.first_wait_s == NegativesSettings().first_wait_s:
        whole = Job(job=whole, negatives={"first_wait_s": 0.0})  # nobody makes any to wait for
    check_early(whole, mines=mine)
    if mine:
        mpiexec_path()
    from launch.main_job import run_job  # brings torch, for a job that may run

    with handlers_kept():
        outcome = run_job(whole, messages(), allow_change, mine)
    run = whole.train.run.folder
    if not outcome["finished"]:
        raise RunStopped(
            f"stopped at step {outcome['step']}, saved in {run}; to go on, make the same call again, or: "
            f"negpool.train(job={str(run / 'job.toml')!r}{'' if mine else ', mine=False'})"
        )
    result = TrainResult.read(run)
    return result if evaluator is None else TrainResult.read(run, _figures(evaluator(result.model())))


def _figures(found: Any) -> dict[str, float]:
    """Return what an evaluator returns by name."""
    if isinstance(found, Mapping):
        return {str(name): float(value) for name, value in found.items()}
    return {"score": float(found)}
