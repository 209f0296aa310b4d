"""Everything a training run needs before its first step: data, tokens, encoder, state, feed, sinks.

A run folder that holds a whole checkpoint is resumed from it, an empty one is started.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.optim import AdamW
from transformers import PreTrainedTokenizerBase

from gradcache import Objective, Temperature
from gradcache.objectives.tile import trained_parameters
from trainer.backends import parallelize
from trainer.batches import Batches
from trainer.budget import kept_budget
from trainer.checkpoint import Saver, clean_parts, load_state, load_weights
from trainer.collapse import Collapse
from trainer.compiling import Compiling, choose
from trainer.data.collate import RowEncoder, TrainingSet, Wants, given_negatives, training_set
from trainer.data.datasets import RetrievalData, open_data
from trainer.data.order import build_order
from trainer.data.sampler import Order
from trainer.early_stop import EarlyStop, RollBack
from trainer.ema import build_average
from trainer.encoder.model import Encoder, Traits
from trainer.encoder.packed import packs
from trainer.encoder.tokens import tokenize_side
from trainer.errors import InputError
from trainer.feed import NegativesFeed
from trainer.fits import check_sizes, check_steps
from trainer.handoff.claim import Claim, claim_side
from trainer.handoff.manifest import clean_staging
from trainer.handoff.weights import checkpoints_folder, is_finite
from trainer.interrupt import Interrupt
from trainer.job import TrainJob
from trainer.last_good import newest_to_resume
from trainer.loading import Loaded, is_empty, load, memory_bytes
from trainer.metrics import Metrics, NoMetrics, NoStatus, Status, TrainerMetrics
from trainer.mined_clusters import MinedClusters
from trainer.optim import build_schedule
from trainer.parallel import take_weights
from trainer.precision import DTYPES, encode_in, loss_scaler, set_tf32, settle_precision, tell_other_precision
from trainer.profile import Profile, open_profile
from trainer.state import TrainState
from trainer.symptoms import Gradients, Lasting
from trainer.tasks import Task, build_objectives, build_tasks, check_grades, loss_options
from trainer.trackers import check_trackers
from trainer.warned import Warnings
from trainer.world import World

log = logging.getLogger(__name__)


@dataclass
class Training:
    """A run that is ready for its next step."""

    job: TrainJob
    world: World
    data: RetrievalData
    dataset: TrainingSet
    batches: Batches  # for the encoder under its backend, under autocast if that is asked for
    state: TrainState
    plain: Encoder | None  # a copy that no backend holds: what is published and, of a sharded one, evaluated
    lr_factor: Callable[[int], float]  # of a step's learning rate
    saver: Saver
    tokenizer: PreTrainedTokenizerBase
    traits: Traits
    feed: NegativesFeed
    interrupt: Interrupt
    metrics: Metrics
    status: Status | NoStatus
    order: Order  # of the training queries
    clusters: MinedClusters | None  # that make its batches
    tasks: dict[int | None, Task]  # what becomes of each source's queries
    num_steps: int
    claim: Claim  # this start's place in the run folder
    saved_step: int | None  # of the newest checkpoint
    warnings: Warnings
    profile: Profile
    compiling: Compiling  # of the layers
    collapse: Collapse = field(default_factory=Collapse)
    gradients: Gradients = field(default_factory=Gradients)
    narrowing: Lasting = field(default_factory=Lasting)  # of the embeddings of steps
    temperature: float | None = None  # with which the last step's loss was computed
    is_at_bound: bool = False  # whether it was learnt and at its minimum
    data_s: float = 0.0  # that the last step took to put its batch together
    dev: dict[str, Any] | None = None  # the last evaluation in between
    told_ways: set[str] = field(default_factory=set)  # what travels to the other ranks, as the log says once
    batch_key: str = ""  # of the queries of the last step: equal keys, equal global batches


def prepare(job: TrainJob, world: World) -> Training:
    """Return a started or resumed run. Collective. Raises InputError for a job or data that cannot be used."""
    job = settle_precision(job, world)
    run = job.run.folder
    check_trackers(job.run.trackers)
    job.loss.check_memory(-world.all_max([-memory_bytes(world)])[0])
    claim = claim_run(job, world)
    status: Status | NoStatus = Status(run, "trainer", claim.check) if world.speaks else NoStatus()
    status.update(phase="reading the data", step=0)
    data = open_data(job.data, job.sources)
    check_sizes(job, data, world.num_ranks)
    checkpoint = world.decide(lambda: newest_to_resume(run))
    if checkpoint is not None and checkpoint.manifest["data_digest"] != data.digest:
        raise InputError(
            f"{data.path} is not the data that {checkpoint.folder} was trained on; give it back what it held, "
            "or set run.folder to a new folder"
        )
    set_tf32(job.precision)
    status.update(phase="loading the model")
    loaded = load(job, world)
    encoder, tokenizer, traits = loaded.encoder, loaded.tokenizer, loaded.traits
    if checkpoint is not None and not is_empty(encoder):
        load_weights(checkpoint, encoder, world)
    job.loss.check_model(encoder.width)
    status.update(phase="tokenising")
    dataset = tokenized(job, data, tokenizer, traits)
    order = order_of(job, data, dataset)
    status.update(phase="preparing")
    num_steps = job.optim.steps or max(1, math.ceil(job.optim.epochs * order.steps_per_epoch))
    check_steps(job, num_steps)
    compiling = choose(job, world, dataset, encoder, num_steps)
    objectives = build_objectives(job, world.device)
    state = first_state(job, world, loaded, objectives)
    if checkpoint is None:
        check_weights(job, world, state)
    else:
        load_state(checkpoint, state, world)
        tell_other_precision(checkpoint, job.precision)
        state.budget = kept_budget(state.budget, job, world)
        num_steps = state.step if state.early_stop.is_over else num_steps
        log.info("resumed from step %d of %d", state.step, num_steps)
    interrupt, saver = Interrupt(), Saver(run, world, claim)
    clusters = MinedClusters(world, run, dataset.num_queries) if job.batch.clusters == "mined" else None
    feed = open_feed(job, world, data, state, lambda: interrupt.is_set() or saver.has_failed(), clusters is not None)
    metrics: Metrics = TrainerMetrics(run, job.run.trackers) if world.speaks else NoMetrics()
    status.update(step=state.step, num_steps=num_steps, compiled=compiling.compiles, **start_figures(job, state))
    tasks = build_tasks(loss_options(job.loss, job.precision, objectives["loss"]), data, state.temperature, objectives)
    wants = {number: Wants.of(task.loss.objective) for number, task in tasks.items()}
    check_grades(job, data, dataset, tasks)
    return Training(
        job,
        world,
        data,
        dataset,
        Batches(job, world, dataset, row_encoder(job, world, encoder, state), num_steps, wants),
        state,
        loaded.plain,
        build_schedule(job.optim, num_steps),
        saver,
        tokenizer,
        traits,
        feed,
        interrupt,
        metrics,
        status,
        order,
        clusters,
        tasks,
        num_steps,
        claim,
        None if checkpoint is None else checkpoint.step,
        Warnings(status, metrics),
        open_profile(job.profile.numbers, range(state.step + 1, num_steps + 1), world, run / "logs", metrics.record),
        compiling,
    )


def row_encoder(job: TrainJob, world: World, encoder: Encoder, state: TrainState) -> RowEncoder:
    """Return what encodes the chunks of a step: the encoder under its backend, under autocast if that is asked for."""
    encode = encode_in(state.parallel.module, job.precision, world.device)
    is_packed = packs(encoder, world.device, DTYPES[job.precision.encode])
    return RowEncoder(encode, world.device, encoder.has_two_towers, is_packed)


def start_figures(job: TrainJob, state: TrainState) -> dict[str, Any]:
    """Return what the status says of a start: where it begins, what was swapped in before, when the miner gets checkpoints."""
    told = {"resumed_step": state.step, "swaps": state.swaps, "swaps_before": len(state.swaps)}
    return told if job.negatives.schedule else told | {"checkpoint_every_steps": job.checkpoint.every_steps}


def order_of(job: TrainJob, data: RetrievalData, dataset: TrainingSet) -> Order:
    """Return the order of a job's data; mined clusters come with the epochs."""
    batch = job.batch
    return build_order(
        data,
        dataset,
        job.data.train_split,
        seed=job.run.seed,
        batch=batch.queries,
        mode=batch.mode,
        avoid_duplicates=batch.avoid_duplicates,
        clusters=None if batch.clusters == "mined" else batch.clusters,
    )


def open_feed(
    job: TrainJob, world: World, data: RetrievalData, state: TrainState, should_stop: Callable[[], bool], has_clusters: bool
) -> NegativesFeed:
    """Return the feed of a run; versions that were taken back stay so."""
    split, is_drawn_from = job.data.train_split, job.negatives.per_query != 0
    feed = NegativesFeed(
        world,
        job.run.folder,
        job.negatives,
        len(data.training_queries(split)),
        len(data.corpus),
        should_stop,
        given_negatives(data, split) if is_drawn_from else None,
        data_digest=data.digest,
        is_used=is_drawn_from or has_clusters,
    )
    for version in state.roll_back.refused:
        if version is not None:
            feed.take_back(version, state.negatives_version)
    return feed


def first_state(job: TrainJob, world: World, loaded: Loaded, objectives: dict[str, Objective]) -> TrainState:
    """Return the state before the first step, the encoder under its backend. Collective."""
    must_take_weights = is_empty(loaded.encoder)
    parallel = parallelize(loaded.encoder, world, job.parallel, job.optim, DTYPES[job.precision.encode])
    if must_take_weights:
        take_weights(parallel, loaded.plain, world)
    loss = job.loss
    temperature = Temperature(loss.temperature, loss.learn_temperature, loss.min_temperature).to(world.device)
    learnt = [p for objective in objectives.values() for p in trained_parameters(objective)]
    return TrainState(
        parallel,
        temperature,
        AdamW([*temperature.parameters(), *learnt], lr=job.optim.temperature_lr, weight_decay=0.0),
        loss_scaler(job.precision, world.device),
        build_average(parallel, job.ema),
        EarlyStop(job.stop),
        RollBack(job.stop),
        objectives=objectives,
    )


def check_weights(job: TrainJob, world: World, state: TrainState) -> None:
    """Raise InputError, on every rank alike, for a model that is broken before it is trained. Collective."""
    broken = [part.name for part in state.parallel.fragments() if not is_finite(part.values)]
    if world.all_max([len(broken)])[0]:
        raise InputError(
            f"weights of {job.model.name} are not finite{f' ({broken[0]})' if broken else ''}; set model.name to another"
        )


def claim_run(job: TrainJob, world: World) -> Claim:
    """Take the trainer's place in the run folder and clear what killed writers left there. Collective.

    Raises InputError, on every rank, if a live trainer holds it.
    """

    def take() -> Claim:
        taken = claim_side(job.run.folder, "trainer")
        clean_staging(checkpoints_folder(job.run.folder))
        clean_parts(job.run.folder)
        return taken

    return world.decide(take)


def tokenized(job: TrainJob, data: RetrievalData, tokenizer: PreTrainedTokenizerBase, traits: Traits) -> TrainingSet:
    """Return the training set of a job's data."""
    split = job.data.train_split
    queries = tokenize_side(data, "queries", tokenizer, traits).select(data.training_queries(split))
    passages = tokenize_side(data, "corpus", tokenizer, traits)
    return training_set(data, split, queries, passages)
