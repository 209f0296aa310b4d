"""Everything a training run needs before its first step: data, tokens, encoder, state, feed, sinks.

A run folder that holds a whole checkpoint is resumed from it, an empty one is started.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import filelock
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gradcache import Budget, GradientSync, Temperature
from trainer.checkpoint import load_checkpoint
from trainer.data.collate import TrainingSet, training_set
from trainer.data.datasets import RetrievalData, open_data
from trainer.data.sampler import steps_per_epoch
from trainer.encoder.model import Traits, load_encoder
from trainer.encoder.tokens import tokenize_side
from trainer.errors import InputError, RunInUse
from trainer.feed import NegativesFeed
from trainer.handoff.manifest import clean_staging
from trainer.handoff.weights import Checkpoint, checkpoints_folder, newest_checkpoint
from trainer.interrupt import Interrupt
from trainer.job import TrainJob
from trainer.metrics import Metrics, NoMetrics, NoStatus, Status, TrainerMetrics
from trainer.optim import build_optimizer
from trainer.parallel import parallelize
from trainer.precision import encode_in, loss_scaler, set_tf32
from trainer.state import TrainState
from trainer.world import World

log = logging.getLogger(__name__)


@dataclass
class Training:
    """A run that is ready for its next step."""

    job: TrainJob
    world: World
    data: RetrievalData
    dataset: TrainingSet
    encode: Callable[..., Tensor]  # the encoder, its DDP wrapper, under autocast if that is asked for
    sync: GradientSync
    state: TrainState
    tokenizer: PreTrainedTokenizerBase
    traits: Traits
    feed: NegativesFeed
    interrupt: Interrupt
    metrics: Metrics
    status: Status | NoStatus
    num_steps: int
    budget: Budget | None  # of memory; found with the first batch
    lock: filelock.BaseFileLock | None  # held by rank 0 while it lives


def prepare(job: TrainJob, world: World) -> Training:
    """Return a started or resumed run. Collective. Raises InputError for a job or data that cannot be used."""
    if job.parallel.backend != "ddp":
        raise InputError(
            f'parallel.backend="{job.parallel.backend}" can be checked with negpool check, but not be trained with yet: '
            'its checkpoints are still to come; set parallel.backend="ddp"'
        )
    run = job.run.folder
    lock = claim_run(job, world)
    status: Status | NoStatus = Status(run, "trainer") if world.speaks else NoStatus()
    status.update(phase="preparing", step=0)
    data = open_data(job.data, job.sources)
    check_sizes(job, data, world.num_ranks)
    checkpoint = world.broadcast(_newest(job) if world.speaks else None)
    settings = job.model if checkpoint is None else replace(job.model, name=str(checkpoint.encoder_folder))
    set_tf32(job.precision)
    encoder, tokenizer, traits = load_encoder(settings)
    dataset = tokenized(job, data, tokenizer, traits)
    num_steps = num_steps_of(job, dataset.num_queries)
    parallel = parallelize(encoder, world, job.parallel)
    temperature = Temperature(job.loss.temperature, job.loss.learn_temperature).to(world.device)
    optimizer, schedule = build_optimizer(encoder, temperature, job.optim, num_steps)
    state = TrainState(encoder, temperature, optimizer, schedule, loss_scaler(job.precision, world.device))
    if checkpoint is not None:
        load_checkpoint(checkpoint, state)
        log.info("resumed from step %d of %d", state.step, num_steps)
    interrupt = Interrupt()
    num_passages = len(data.corpus)
    feed = NegativesFeed(world, run, job.negatives, dataset.num_queries, num_passages, interrupt.is_set)
    metrics: Metrics = TrainerMetrics(run) if world.speaks else NoMetrics()
    status.update(step=state.step, num_steps=num_steps)
    return Training(
        job,
        world,
        data,
        dataset,
        encode_in(parallel.module, job.precision, world.device),
        parallel.sync,
        state,
        tokenizer,
        traits,
        feed,
        interrupt,
        metrics,
        status,
        num_steps,
        None,
        lock,
    )


def claim_run(job: TrainJob, world: World) -> filelock.BaseFileLock | None:
    """Take the trainer's place in the run folder on rank 0 and clear what killed writers left there.

    Raises InputError if a live trainer holds it.
    """
    if not world.speaks:
        return None
    path = job.run.folder / "status" / "trainer.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise RunInUse(f"another trainer is at work in {job.run.folder}; wait for it, or set run.folder") from error
    clean_staging(checkpoints_folder(job.run.folder))
    return lock


def check_sizes(job: TrainJob, data: RetrievalData, num_ranks: int) -> None:
    """Raise InputError where the data, the batch and the ranks do not fit together."""
    num_queries = len(data.training_queries(job.data.train_split))
    if job.batch.queries < num_ranks:
        raise InputError(
            f"batch.queries={job.batch.queries} is less than the {num_ranks} ranks; every rank needs a query, "
            "so set batch.queries higher or launch fewer ranks"
        )
    if num_queries < job.batch.queries:
        raise InputError(
            f"{data.path} has {num_queries} training queries, fewer than batch.queries={job.batch.queries}; "
            "set batch.queries lower"
        )


def num_steps_of(job: TrainJob, num_queries: int) -> int:
    """Return the length of the run in steps."""
    if job.optim.steps is not None:
        return job.optim.steps
    return max(1, math.ceil(job.optim.epochs * steps_per_epoch(num_queries, job.batch.queries)))


def _newest(job: TrainJob) -> Checkpoint | None:
    return newest_checkpoint(job.run.folder, lambda torn: log.warning("checkpoint passed over: %s", torn))


def tokenized(job: TrainJob, data: RetrievalData, tokenizer: PreTrainedTokenizerBase, traits: Traits) -> TrainingSet:
    """Return the training set of a job's data."""
    split = job.data.train_split
    queries = tokenize_side(data, "queries", tokenizer, traits).select(data.training_queries(split))
    passages = tokenize_side(data, "corpus", tokenizer, traits)
    return training_set(data, split, queries, passages)
