"""What happens to a run at set steps: it is saved, evaluated, and evaluations on dev may end it or take negatives back."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from trainer.collapse import LEAST_SPREAD, in_words
from trainer.encoder.model import save_encoder, weights_digest
from trainer.encoder.settings import KEEP_ENCODINGS
from trainer.encoder.shards import prune_shards
from trainer.encoder.towers import Encoder
from trainer.errors import InputError, MachineFailed, MustNotGoOn
from trainer.evaluate import evaluate
from trainer.handoff.manifest import prune, write_atomically
from trainer.handoff.weights import checkpoints_folder
from trainer.job import TrainJob
from trainer.last_good import last_good
from trainer.parallel import copy_weights, fill_copy
from trainer.prepare import Training

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
    measured = {f"{name}, {found['split']}": found for name, found in evaluations(job).items()}
    measured |= {} if run.dev is None else {f"on the way, {run.dev['split']}": run.dev}
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
    """Delete all but the newest checkpoints, the pinned ones, the best, those of round steps and what a schedule still mines."""
    settings = job.checkpoint
    # A fixed schedule may mine a checkpoint long after it was written: as long as its negatives are not in force.
    needed = {entry.checkpoint for entry in job.negatives.schedule if entry.step >= step} | {best_step}

    def is_needed(folder: Path) -> bool:
        of_folder = int(folder.name.removeprefix("step-"))
        is_round = settings.keep_every_steps is not None and of_folder % settings.keep_every_steps == 0
        return is_round or of_folder in needed

    prune(checkpoints_folder(job.run.folder), settings.keep, is_needed)


def evaluate_once(run: Training, name: str) -> None:
    """Evaluate as `name` unless an earlier start of this run has done so. Collective. Raises Stopped."""
    split = run.job.eval.split
    if split not in run.data.qrels:
        log.info("no qrels/%s.tsv: not evaluated", split)
        return
    path = run.job.run.folder / "evaluations" / f"{name}.json"
    if run.world.broadcast(path.exists() or (name == "untrained" and run.state.step > 0)):
        return
    measures = _evaluated(run, split, f"evaluating the {name} model")
    if run.world.speaks:
        write_atomically(path, json.dumps({"step": run.state.step, "split": split, **measures}))
        run.metrics.record(run.state.step, {f"eval/{key}": value for key, value in measures.items()})
        log.info("%s model: %s", name, _in_words(measures))


def evaluate_on_dev(run: Training) -> None:
    """Evaluate in between, at a step that is due, and do what section stop makes of it. Collective. Raises Stopped."""
    settings, state = run.job.eval, run.state
    is_due = settings.every_steps is not None and state.step > 0 and state.step % settings.every_steps == 0
    if not is_due or state.step == run.num_steps or state.early_stop.last_step == state.step:
        return
    measures = _evaluated(run, settings.dev_split, "evaluating on dev")
    run.dev = {"step": state.step, "split": settings.dev_split, **measures}
    run.metrics.record(state.step, {f"dev/{key}": value for key, value in measures.items()})
    if run.world.speaks:
        log.info("step %d, dev: %s", state.step, _in_words(measures))
    if state.early_stop.observe(state.step, measures):
        log.info("step %d: no gain on dev since step %s; the run ends here", state.step, state.early_stop.best_step)
        run.num_steps = state.step
    fall = state.roll_back.observe(state.negatives_version, measures)
    if fall is not None and fall.version is not None:
        run.feed.take_back(fall.version, fall.back_to)
        values = {"event": "negatives taken back", "negatives/version": fall.version, "negatives/back_to": fall.back_to}
        run.metrics.record(state.step, values)
        log.warning(
            "step %d: dev fell from %.4f to %.4f under negatives v%d, which are taken back",
            state.step, fall.before, fall.after, fall.version,
        )  # fmt: skip


def evaluations(job: TrainJob) -> dict[str, dict[str, float]]:
    """Return what was evaluated in a run so far, by name."""
    folder = job.run.folder / "evaluations"
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


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


def _evaluated(run: Training, split: str, phase: str) -> dict[str, float]:
    folder, step = run.job.run.folder, run.state.step
    has_checkpoint = step % run.job.checkpoint.every_steps == 0 or step == run.num_steps
    # What the miner will need, too, or nobody else.
    shards = folder / "shards" if has_checkpoint else folder / "evaluations" / "shards"
    run.status.update(phase=phase, training_done=run.state.step == run.num_steps, done=0, total=None)

    health: dict[str, Any] = {}

    def on_health(found: dict[str, Any]) -> None:
        health.update(found)
        run.metrics.record(step, found)

    with evaluable(run) as encoder:
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
        )
    run.status.update(last_evaluation={"step": step, "split": split, **measures})
    _check_health(run, health)
    if run.world.speaks:
        # Behind the loop's back: the others are about to take a step together.
        threading.Thread(target=_prune, args=(shards, KEEP_ENCODINGS if has_checkpoint else 0), daemon=True).start()
    return measures


def _check_health(run: Training, health: dict[str, Any]) -> None:
    """Raise MustNotGoOn, on every rank alike, where training has given all evaluated texts one embedding. Collective.

    health: of the evaluation, on rank 0.
    """
    if run.state.step == 0:
        return
    # Of the wider side: all texts of one may be equal.
    spreads = [value for name, value in health.items() if name.startswith("health/spread/")]
    spread = run.world.broadcast(max(spreads, default=1.0))
    if spread >= LEAST_SPREAD:
        return
    run.saver.wait()
    found = f"all evaluated texts have nearly one embedding, with a mean cosine of {1 - spread:.4f}"
    good = last_good(run.job.run.folder, run.state.early_stop.best_step or 0)
    raise MustNotGoOn(in_words(run.state.step, found, good, run.job.optim.lr))


def _prune(shards: Path, keep: int) -> None:
    try:
        prune_shards(shards, keep)
    except (OSError, InputError, MachineFailed) as error:
        log.warning("old embeddings stay in %s: %s", shards, error)


def _in_words(measures: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.4f}" for key, value in measures.items())
