"""What happens to a run at set steps: it is saved, evaluated, and evaluations on dev may end it or take negatives back."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from trainer.encoder.model import ModelSettings, load_encoder, save_encoder, weights_digest
from trainer.encoder.settings import KEEP_ENCODINGS
from trainer.encoder.shards import prune_shards
from trainer.encoder.towers import Encoder
from trainer.errors import InputError, MachineFailed
from trainer.evaluate import evaluate
from trainer.handoff.retention import prune
from trainer.handoff.weights import Checkpoint, checkpoint_name, checkpoints_folder, write_best
from trainer.job import TrainJob
from trainer.parallel import copy_weights, fill_copy
from trainer.precision import computed_in
from trainer.prepare import Training
from trainer.scores import TESTED, Scores, read_scores, write_scores
from trainer.symptoms import shape_of
from trainer.watched import UNTRAINED, check_health, keep_on_dev, warn_of_dev

log = logging.getLogger(__name__)


def save(run: Training) -> None:
    """Publish a checkpoint of the present step and prune old ones, behind the loop's back. Collective."""
    started = time.perf_counter()
    run.saver.wait()
    state, is_final = run.state, run.state.step == run.num_steps
    if run.saved_step == state.step:
        return
    run.saved_step = state.step
    with state.average.swapped_in():
        copy_weights(state.parallel, run.plain)
    fields = {"data_digest": run.data.digest, "is_final": is_final, "num_steps": run.num_steps}
    fields["precision"] = computed_in(run.job.precision)
    origin = origin_of(run) if run.world.speaks else {}  # of now: the loop goes on while it is written

    def write_encoder(folder: Path) -> dict[str, Any]:
        assert run.plain is not None
        save_encoder(folder, run.plain, run.tokenizer, run.traits, origin=origin)
        return {"weights_digest": weights_digest(run.plain), **fields}

    step, best = state.step, state.early_stop.best_step
    run.saver.save(state, write_encoder if run.world.speaks else None, lambda: prune_checkpoints(run.job, step, best))
    run.metrics.record(state.step, {"event": "saved", "time/save_s": round(time.perf_counter() - started, 4)})


def origin_of(run: Training) -> dict[str, Any]:
    """Return what a model card says of how the model was made: names and numbers, no places."""
    job, state = run.job, run.state
    measured = {f"{name}, {found['split']}": found for name, found in evaluations(job).items() if name == "untrained"}
    if run.dev is not None:  # what is compared has to be of the same queries; the test of this checkpoint is yet to come
        before = read_scores(job.run.folder, UNTRAINED)
        known = {} if before is None else {"untrained": {"step": before.step, **before.measures}}
        measured = {f"{name}, {run.dev['split']}": found for name, found in (*known.items(), ("trained", run.dev))}
    return {
        "base": job.model.name,
        "data": ", ".join(job.sources) or (job.data.path.name if job.data.path.exists() else str(job.data.path)),
        "training queries": run.dataset.num_queries,
        "objective": job.loss.objective,
        "queries a step": job.batch.queries,
        "hard negatives a query": job.negatives.per_query,
        "negatives": _negatives_in_words(run),
        "steps": state.step,
        "metrics": {name: {key: value for key, value in found.items() if key != "split"} for name, found in measured.items()},
    }


def _negatives_in_words(run: Training) -> str:
    if run.job.negatives.per_query == 0 or (run.state.negatives_version is None and run.data.given is None):
        return "those of the batch"
    return "named by the data" if run.state.negatives_version is None else f"mined, version {run.state.negatives_version}"


def prune_checkpoints(job: TrainJob, step: int, best_step: int | None) -> None:
    """Name the best checkpoint, and delete all but it, the newest, the pinned ones, those of round steps and of a schedule."""
    settings = job.checkpoint
    if best_step is not None and (checkpoints_folder(job.run.folder) / checkpoint_name(best_step)).is_dir():
        write_best(job.run.folder, best_step)
    # A fixed schedule may mine a checkpoint long after it was written: as long as its negatives are not in force.
    needed = {entry.checkpoint for entry in job.negatives.schedule if entry.step >= step} | {best_step}

    def is_needed(folder: Path) -> bool:
        of_folder = int(folder.name.removeprefix("step-"))
        is_round = settings.keep_every_steps is not None and of_folder % settings.keep_every_steps == 0
        return is_round or of_folder in needed

    prune(checkpoints_folder(job.run.folder), settings.keep, is_needed)


def evaluate_once(run: Training, name: str, checkpoint: Checkpoint | None = None) -> None:
    """Evaluate on the test split as `name`, unless an earlier start of this run has done so. Collective. Raises Stopped.

    checkpoint: whose weights; None: the present ones.
    """
    split, folder = run.job.eval.split, run.job.run.folder
    if split not in run.data.qrels:
        log.info("no qrels/%s.tsv: not evaluated", split)
        return
    step = run.state.step if checkpoint is None else checkpoint.step
    kept = read_scores(folder, name) if run.world.speaks else None
    is_kept = kept is not None and (kept.step, kept.split) == (step, split)
    if run.world.broadcast(is_kept or (name == "untrained" and step > 0)):
        return
    found = _evaluated(run, split, f"evaluating the {name} model", checkpoint)
    if run.world.speaks:
        write_scores(folder, name, found)
        kind = "eval" if checkpoint is None else "best"  # at the present step: trackers take no earlier ones
        run.metrics.record(run.state.step, {f"{kind}/{key}": value for key, value in found.measures.items()})
        log.info("%s model: %s", name, _in_words(found.measures))


def evaluate_on_dev(run: Training) -> bool:
    """Evaluate on dev at a step that is due, and do what section stop makes of it; return whether it is the best so far.

    Collective. Raises Stopped.
    """
    settings, state = run.job.eval, run.state
    is_at_end = state.step == run.num_steps
    is_due = settings.every_steps is not None and (state.step % settings.every_steps == 0 or is_at_end)
    if not is_due or state.early_stop.last_step == state.step:
        return False
    found = _evaluated(run, settings.dev_split, "evaluating on dev")
    run.metrics.record(state.step, {f"dev/{key}": value for key, value in found.measures.items()})
    if run.world.speaks:
        log.info("step %d, dev: %s", state.step, _in_words(found.measures))
    if state.step == 0:  # no checkpoint of training, and no gain or loss of it
        keep_on_dev(run, UNTRAINED, found)
        return False
    run.dev = {"step": state.step, "split": settings.dev_split, **found.measures}
    if state.early_stop.observe(state.step, found.measures) and not is_at_end:
        best = state.early_stop.best_step
        log.info("step %d: no gain on dev for long enough, and the best was step %s; the run ends here", state.step, best)
        run.num_steps = state.step
    is_best = state.early_stop.best_step == state.step
    warn_of_dev(run, found, is_best)
    fall = state.roll_back.observe(state.negatives_version, found.measures)
    if fall is not None and fall.version is not None and not is_at_end:
        run.feed.take_back(fall.version, fall.back_to)
        values = {"event": "negatives taken back", "negatives/version": fall.version, "negatives/back_to": fall.back_to}
        run.metrics.record(state.step, values)
        log.warning(
            "step %d: dev fell from %.4f to %.4f under negatives v%d, which are taken back",
            state.step, fall.before, fall.after, fall.version,
        )  # fmt: skip
    return is_best


def evaluations(job: TrainJob) -> dict[str, dict[str, Any]]:
    """Return what a run has tested so far, by name: step, split and measures."""
    found = {name: read_scores(job.run.folder, name) for name in TESTED}
    return {
        name: {"step": scores.step, "split": scores.split, **scores.measures}
        for name, scores in found.items() if scores is not None
    }  # fmt: skip


@contextlib.contextmanager
def evaluable(run: Training) -> Iterator[Encoder]:
    """Give an encoder with the present weights, or their average, that this rank can use by itself. Collective."""
    parallel, average = run.state.parallel, run.state.average
    if not parallel.is_sharded:
        with average.swapped_in():
            yield cast(Encoder, parallel.encoder)
        return
    assert run.plain is not None
    run.saver.wait()
    plain, home = run.plain, next(run.plain.parameters()).device  # meta: this rank has no copy between evaluations
    has_frozen_copy = run.job.model.quantize is not None  # 4-bit weights are on every rank, and cannot be sent
    plain.to(run.world.device) if has_frozen_copy else plain.to_empty(device=run.world.device)
    with average.swapped_in():
        copy_weights(parallel, plain) if has_frozen_copy else fill_copy(parallel, plain)
    yield plain
    plain.to(home)


@contextlib.contextmanager
def loaded(run: Training, checkpoint: Checkpoint) -> Iterator[Encoder]:
    """Give the encoder of a checkpoint to this rank, beside the present one."""
    encoder, *_ = load_encoder(ModelSettings(name=str(checkpoint.encoder_folder)))
    yield encoder.to(run.world.device)


def _evaluated(run: Training, split: str, phase: str, checkpoint: Checkpoint | None = None) -> Scores:
    folder, step = run.job.run.folder, run.state.step if checkpoint is None else checkpoint.step
    has_checkpoint = step % run.job.checkpoint.every_steps == 0 or step == run.num_steps or checkpoint is not None
    # What the miner will need, too, or nobody else.
    shards = folder / "shards" if has_checkpoint else folder / "evaluations" / "shards"
    run.status.update(phase=phase, training_done=run.state.step == run.num_steps, done=0, total=None)
    health: dict[str, Any] = {}
    each: list[np.ndarray] = []

    def on_health(found: dict[str, Any]) -> None:
        health.update(found)
        if checkpoint is None:
            run.metrics.record(step, found)

    with evaluable(run) if checkpoint is None else loaded(run, checkpoint) as encoder:
        measures = evaluate(
            run.world,
            run.data,
            split,
            encoder,
            run.tokenizer,
            run.traits,
            shards,
            on_progress=lambda done, total: run.status.update(done=done, total=total),
            should_stop=run.interrupt.is_set,
            on_health=on_health,
            on_each=each.append,
        )
    run.status.update(last_evaluation={"step": step, "split": split, **measures})
    shape = shape_of(health)
    if step > 0:
        check_health(run, step, shape)
    if run.world.speaks:
        # Behind the loop's back: the others are about to take a step together.
        threading.Thread(target=_prune, args=(shards, KEEP_ENCODINGS if has_checkpoint else 0), daemon=True).start()
    return Scores(step, split, measures, each[0] if each else None, shape)


def _prune(shards: Path, keep: int) -> None:
    try:
        prune_shards(shards, keep)
    except (OSError, InputError, MachineFailed) as error:
        log.warning("old embeddings stay in %s: %s", shards, error)


def _in_words(measures: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.4f}" for key, value in measures.items())
