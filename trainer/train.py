"""The training loop.

One step: agree on the negatives in force, collate this rank's share of the global batch, take the cached step, clip,
update, record, save. Everything random in it is a function of (seed, step), so a run that was killed and resumed goes
the way that an undisturbed one goes.
"""

import contextlib
import json
import logging
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
import xxhash

from gradcache import OBJECTIVES, NotFinite, StepResult, cached_step
from trainer.budget import step_budget
from trainer.data.collate import collate
from trainer.data.sampler import global_batch, rank_slice
from trainer.encoder.model import Encoder, save_encoder
from trainer.errors import InputError
from trainer.evaluate import Stopped, evaluate
from trainer.handoff.manifest import prune, write_atomically
from trainer.handoff.weights import checkpoint_name, checkpoints_folder
from trainer.job import TrainJob
from trainer.optim import set_learning_rate
from trainer.parallel import copy_weights
from trainer.precision import product_dtype
from trainer.prepare import Training, prepare
from trainer.state import Outcome
from trainer.world import World

log = logging.getLogger(__name__)


def train(job: TrainJob, world: World) -> Outcome:
    """Train to the end, or until asked to stop, and return how it ended. Collective."""
    run = prepare(job, world)
    state = run.state
    try:
        evaluate_once(run, "untrained")
        if state.step == 0:
            save(run)
        while state.step < run.num_steps:
            if switch_negatives(run):
                return stop(run)
            started = time.perf_counter()
            result = step(run)
            grad_norm = update(run)
            run.saver.check()
            state.step += 1
            record(run, result, grad_norm, time.perf_counter() - started)
            if state.step % job.checkpoint.every_steps == 0 or state.step == run.num_steps:
                save(run)
        evaluate_once(run, "trained")
        run.saver.wait()
    except Stopped:
        return stop(run)
    except NotFinite as error:
        raise InputError(f"step {state.step}: {_name_text(run, error)}") from error
    finally:
        run.feed.close()
        run.metrics.close()
    run.status.update(phase="finished")
    return Outcome(finished=True, step=state.step, evaluations=evaluations(job))


def switch_negatives(run: Training) -> bool:
    """Bring the negatives of the next step into force; return whether to stop before it. Collective."""
    asked_to_stop = run.feed.before_step(run.state.step, on_wait=lambda: run.status.update(phase="waiting for negatives"))
    in_force = run.feed.in_force
    if in_force is not None and in_force.version != run.state.negatives_version:
        run.state.negatives_version = in_force.version
        run.state.swaps.append([run.state.step, in_force.version])
        run.metrics.record(
            run.state.step,
            {
                "event": "negatives swapped",
                "negatives/version": in_force.version,
                "negatives/checkpoint_step": in_force.checkpoint_step,
            },
        )
        origin = "BM25" if in_force.checkpoint_step is None else f"the checkpoint of step {in_force.checkpoint_step}"
        log.info("step %d: negatives v%d in force, mined from %s", run.state.step, in_force.version, origin)
    return asked_to_stop


def step(run: Training) -> StepResult:
    """Leave the exact gradient of this step in the parameters. Collective."""
    job, state, world = run.job, run.state, run.world
    rows = global_batch(job.run.seed, state.step, run.dataset.num_queries, job.batch.queries)
    run.batch_key = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(rows).tobytes())
    batch = collate(
        run.dataset,
        run.feed.in_force,
        rank_slice(rows, world.rank, world.num_ranks),
        encode=run.encode,
        device=world.device,
        per_query=job.negatives.per_query,
        seed=job.run.seed,
        step=state.step,
    )
    if run.budget is None:
        run.budget = step_budget(job.chunk, batch, state.parallel.encoder, world)
    result = cached_step(
        batch,
        objective=OBJECTIVES[job.loss.objective],
        symmetric=job.loss.symmetric,
        same_side=job.loss.same_side,
        tile_rows=job.loss.tile_rows,
        product_dtype=product_dtype(job.precision),
        scaler=state.scaler,
        temperature=state.temperature,
        sync=state.parallel.sync,
        group=world.group,
        chunk_tokens=run.budget.chunk_tokens,
        keep_graphs=run.budget.keep_graphs,
        seed=job.run.seed,
        step=state.step,
    )
    if result.num_halved:
        run.budget = run.budget.halved()
        log.warning("step %d: out of memory; from here on chunk.tokens is %d", state.step, run.budget.chunk_tokens)
    return result


def update(run: Training) -> float:
    """Clip, step the optimizers, and return the norm of the encoder's gradient before clipping. Collective if sharded."""
    state, optim, factor = run.state, run.job.optim, run.lr_factor(run.state.step)
    set_learning_rate(state.parallel.optimizer, optim.lr * factor)
    norm = state.parallel.update(state.scaler)
    if state.temperature.log_scale.grad is not None:
        set_learning_rate(state.temperature_optimizer, optim.temperature_lr * factor)
        state.scaler.unscale_(state.temperature_optimizer)
        torch.nn.utils.clip_grad_norm_(state.temperature.parameters(), optim.max_grad_norm)
        state.scaler.step(state.temperature_optimizer)
        state.temperature_optimizer.zero_grad(set_to_none=True)
    state.scaler.update()
    return norm


def record(run: Training, result: StepResult, grad_norm: float, seconds: float) -> None:
    """Write the step's figures to the log, the metrics and the status."""
    state, num_left = run.state, run.num_steps - run.state.step
    state.seconds += seconds
    in_force = run.feed.in_force
    mined_at = None if in_force is None else in_force.checkpoint_step
    tokens_per_s = result.num_tokens / seconds
    values = {
        "loss": result.loss,
        "grad_norm": grad_norm,
        "lr": run.job.optim.lr * run.lr_factor(state.step - 1),
        "temperature": state.temperature.value,
        "num_queries": result.num_queries,
        "batch_key": run.batch_key,
        "num_chunks": result.num_chunks,
        "tokens_per_rank_per_s": round(tokens_per_s, 1),
        "chunk_tokens": None if run.budget is None else run.budget.chunk_tokens,
        "share/padding": round(1 - result.num_tokens / max(1, result.num_padded_tokens), 4),
        "share/encoded_twice": result.share_encoded_twice,
        "share/masked": result.share_masked,
        "time/step_s": round(seconds, 4),
        "time/encode_s": round(result.encode_s, 4),
        "time/loss_s": round(result.loss_s, 4),
        "time/backward_s": round(result.backward_s, 4),
        "memory/peak_gib": round(peak_memory_gib(run.world), 3),
        "negatives/version": state.negatives_version,
        "negatives/age_steps": None if mined_at is None else state.step - 1 - mined_at,
    }
    run.metrics.record(state.step, values)
    eta_s = state.seconds / state.step * num_left
    run.status.update(phase="training", step=state.step, loss=result.loss, eta_s=eta_s, swaps=state.swaps)
    if run.world.speaks:
        log.info(
            "step %d/%d  loss %.4f  gradient %.3f  %.0f tokens/s a rank  %.1f GiB",
            state.step, run.num_steps, result.loss, grad_norm, tokens_per_s, values["memory/peak_gib"],
        )  # fmt: skip


def _name_text(run: Training, error: NotFinite) -> str:
    """Return a broken embedding's error with the text's id in the place of its key."""
    data, keys = run.data, run.dataset
    queries = data.training_queries(run.job.data.train_split)
    table, names = (keys.queries, data.queries.select(queries)) if error.is_query else (keys.passages, data.corpus)
    found = np.flatnonzero(table.keys(np.arange(len(names))) == error.key)
    return str(error).replace(f"key {error.key}", f"id {names[int(found[0])]['_id']!r}") if len(found) else str(error)


def save(run: Training) -> None:
    """Publish a checkpoint of the present step and prune old ones, behind the loop's back. Collective."""
    started = time.perf_counter()
    run.saver.wait()
    state, is_final = run.state, run.state.step == run.num_steps
    if run.saved_step == state.step:
        return
    run.saved_step = state.step
    copy_weights(state.parallel, run.plain)
    fields = {"data_digest": run.data.digest, "is_final": is_final, "num_steps": run.num_steps}
    published = run.plain if run.world.speaks else None

    def write_encoder(folder: Path) -> None:
        assert run.plain is not None
        save_encoder(folder, run.plain, run.tokenizer, run.traits)

    run.saver.save(state, published, write_encoder, fields, on_published=lambda: prune_checkpoints(run, state.step))
    run.metrics.record(state.step, {"event": "saved", "time/save_s": round(time.perf_counter() - started, 3)})


def prune_checkpoints(run: Training, step: int) -> None:
    """Delete all checkpoints but the newest, the pinned ones, those of round steps and those that a schedule still mines."""
    settings = run.job.checkpoint
    # A fixed schedule may mine a checkpoint long after it was written: as long as its negatives are not in force.
    needed = {checkpoint_name(e.checkpoint) for e in run.job.negatives.schedule if e.step >= step}

    def is_needed(folder: Path) -> bool:
        of_folder = int(folder.name.removeprefix("step-"))
        is_round = settings.keep_every_steps is not None and of_folder % settings.keep_every_steps == 0
        return is_round or folder.name in needed

    prune(checkpoints_folder(run.job.run.folder), settings.keep, is_needed)


def stop(run: Training) -> Outcome:
    """Save and say so: the run was asked to stop. Collective."""
    save(run)
    run.saver.wait()
    run.world.barrier()  # a launcher ends the other ranks as soon as one leaves
    run.status.update(phase="stopped")
    log.info("stopped at step %d of %d as asked; the same command goes on from here", run.state.step, run.num_steps)
    return Outcome(finished=False, step=run.state.step, evaluations=evaluations(run.job))


def evaluate_once(run: Training, name: str) -> None:
    """Evaluate as `name` unless an earlier start of this run has done so. Collective. Raises Stopped."""
    split = run.job.eval.split
    if split not in run.data.qrels:
        log.info("no qrels/%s.tsv: not evaluated", split)
        return
    path = run.job.run.folder / "evaluations" / f"{name}.json"
    is_trained = run.state.step == run.num_steps
    if run.world.broadcast(path.exists() or (name == "untrained" and run.state.step > 0)):
        return
    phase = f"evaluating the {name} model"
    run.status.update(phase=phase, training_done=is_trained, done=0, total=None)
    with evaluable(run) as encoder:
        measures = evaluate(
            run.world,
            run.data,
            split,
            encoder,
            run.tokenizer,
            run.traits,
            run.job.run.folder / "shards",
            on_progress=lambda done, total: run.status.update(done=done, total=total),
            should_stop=run.interrupt.is_set,
        )
    if run.world.speaks:
        write_atomically(path, json.dumps({"step": run.state.step, "split": split, **measures}))
        run.metrics.record(run.state.step, {f"eval/{key}": value for key, value in measures.items()})
        log.info("%s model: %s", name, "  ".join(f"{key} {value:.4f}" for key, value in measures.items()))


@contextlib.contextmanager
def evaluable(run: Training) -> Iterator[Encoder]:
    """Give an encoder with the present weights that this rank can use by itself. Collective if sharded."""
    parallel = run.state.parallel
    if not parallel.is_sharded:
        yield cast(Encoder, parallel.encoder)
        return
    assert run.plain is not None
    run.saver.wait()
    copy_weights(parallel, run.plain)
    yield run.plain.to(run.world.device)
    run.plain.to("cpu")


def evaluations(job: TrainJob) -> dict[str, dict[str, float]]:
    """Return what was evaluated in a run so far, by name."""
    folder = job.run.folder / "evaluations"
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def peak_memory_gib(world: World) -> float:
    """Return the most memory this process has held: on its GPU, or of the host."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
