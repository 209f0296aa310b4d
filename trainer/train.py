"""The training loop.

One step: agree on the negatives in force, collate this rank's share of the global batch, take the cached step, clip,
update, record, save. Everything random in it is a function of (seed, step), so a run that was killed and resumed goes
the way that an undisturbed one goes.
"""

import logging
import resource
import time

import numpy as np
import torch
import xxhash

from gradcache import NotFinite, StepResult, cached_step
from gradcache.replay import replay_seed
from gradcache.spans import span
from gradcache.way import Way
from trainer.batches import Share
from trainer.budget import find_budget
from trainer.data.sampler import sources_begun_anew
from trainer.evaluate import Stopped
from trainer.finish import finish
from trainer.job import TrainJob
from trainer.milestones import evaluate_on_dev, evaluate_once, evaluations, save
from trainer.prepare import Training, prepare
from trainer.state import Outcome
from trainer.tasks import joined
from trainer.update import check_skipped, not_finite, update
from trainer.warm_up import compile_layers
from trainer.watched import check_collapsed, warn_of_job, warn_of_step
from trainer.world import World

log = logging.getLogger(__name__)


def train(job: TrainJob, world: World, began: float | None = None) -> Outcome:
    """Train to the end, or until asked to stop, and return how it ended. Collective.

    began: when this process began with what it needed to come here, its imports, by `time.monotonic`.
    """
    imports_s = 0.0 if began is None else time.monotonic() - began
    run = prepare(job, world)
    state, first_step = run.state, run.state.step
    try:
        evaluate_once(run, "untrained")
        warn_of_job(run)
        if state.step == 0:
            evaluate_on_dev(run)
            save(run)
        while state.step < run.num_steps:
            run.profile.before_step(state.step + 1)
            if switch_negatives(run):
                return stop(run)
            run.status.update(phase="training")
            if state.step == first_step:
                tell_start(run, imports_s)
            result, grad_norm = take_step(run)
            check_skipped(run)
            warn_of_step(run, grad_norm, result.spread)
            check_collapsed(run, result.spread)
            run.profile.after_step(state.step)
            is_best = evaluate_on_dev(run)
            if state.step % job.checkpoint.every_steps == 0 or state.step == run.num_steps or is_best:
                save(run)
        finish(run)
        run.status.update(phase="finished")
    except Stopped:
        return stop(run)
    except NotFinite as error:
        raise not_finite(run, error) from error
    finally:
        run.batches.close()  # before the negatives that it may be reading
        run.feed.close()
        run.profile.close()
        run.metrics.close()
        run.status.close()  # the step at which it ended, for whoever starts it again
        run.claim.release()
    return Outcome(finished=True, step=state.step, evaluations=evaluations(job))


def tell_start(run: Training, imports_s: float) -> None:
    """Log and record what passed before this start's first step, by part."""
    parts = {"imports": imports_s, **run.status.seconds}
    values = {f"time/start/{name.replace(' ', '_')}_s": round(seconds, 3) for name, seconds in parts.items()}
    total = sum(parts.values())
    run.metrics.record(run.state.step, {"event": "started", "time/start_s": round(total, 3), **values})
    if run.world.speaks:
        log.info("the start took %.1f s: %s", total, ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items()))


def switch_negatives(run: Training) -> bool:
    """Bring the negatives of the next step into force; return whether to stop before it. Collective."""
    started = time.perf_counter()
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
                "time/switch_s": round(time.perf_counter() - started, 5),
            },
        )
        origin = "BM25" if in_force.checkpoint_step is None else f"the checkpoint of step {in_force.checkpoint_step}"
        log.info("step %d: negatives v%d in force, mined from %s", run.state.step, in_force.version, origin)
    if run.clusters is not None:
        run.order = run.clusters.order_of(run.order, run.state.step, in_force)
    return asked_to_stop


def take_step(run: Training) -> tuple[StepResult, float]:
    """Take one step with the negatives in force, and return what it found and the gradient's norm. Collective."""
    started = time.perf_counter()
    result = step(run)
    with span("update"):
        grad_norm = update(run)
    run.state.step += 1
    with span("record"):
        record(run, result, grad_norm, time.perf_counter() - started - run.compiling.seconds)
    return result, grad_norm


def step(run: Training) -> StepResult:
    """Leave the exact gradient of this step in the parameters. Collective."""
    run.compiling.seconds = 0.0
    started, number = time.perf_counter(), run.state.step
    with span("batch"):
        shares = run.batches.of_step(number, run.order, run.feed.of_step(number))
    run.data_s, parts = time.perf_counter() - started, [share.part for share in shares]
    run.batch_key = xxhash.xxh3_64_hexdigest(np.concatenate([part.rows for part in parts]).tobytes())
    for source in sources_begun_anew(run.order, number):
        log.info("step %d: source %s begins again, others are longer", number, run.data.sources[source].name)
    results = [take_part(run, share, i, is_last=i == len(parts) - 1) for i, share in enumerate(shares)]
    result = joined(results, [run.tasks[part.source].weight for part in parts])
    if result.num_halved:  # on any rank: all go on with one budget
        assert run.state.budget is not None
        run.state.budget = run.state.budget.halved()
        log.warning("step %d: out of memory; from here on chunk.tokens is %d", number, run.state.budget.chunk_tokens)
    return result


def take_part(run: Training, share: Share, number: int, is_last: bool) -> StepResult:
    """Add the gradient of one task's queries; the last part synchronises the sum. Collective."""
    job, state, world, (part, batch) = run.job, run.state, run.world, share
    task = run.tasks[part.source]
    if state.budget is None:
        state.budget = find_budget(job, task.loss, batch, state.parallel.encoder, world)
    compile_layers(run, batch)
    result = cached_step(
        batch,
        loss=task.loss,
        progress=state.step / max(1, run.num_steps),
        scaler=state.scaler,
        temperature=task.temperature,
        sync=state.parallel.sync,
        group=world.group,
        chunk_tokens=state.budget.chunk_tokens,
        keep_graphs=state.budget.keep_graphs,
        seed=job.run.seed if number == 0 else replay_seed(job.run.seed, number),  # parts must not draw alike
        step=state.step,
        weight=task.weight,
        is_last=is_last,
    )
    tell_way(run, result.way)
    return result


def tell_way(run: Training, way: Way) -> None:
    """Log, once for each, what travels to the other ranks and why."""
    if run.world.group is None or way.travels in run.told_ways:
        return
    run.told_ways.add(way.travels)
    told = run.state.step + 1, way.travels, run.job.loss.gather, way.reason
    log.info("step %d: %s travel to the other ranks, loss.gather=%s; %s", *told)


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
        "skipped": state.num_skipped,
        "temperature": run.temperature,
        "temperature_at_bound": run.is_at_bound,
        "num_queries": result.num_queries,
        "batch_key": run.batch_key,
        "num_chunks": result.num_chunks,
        "tokens_per_rank_per_s": round(tokens_per_s, 1),
        "chunk_tokens": None if state.budget is None else state.budget.chunk_tokens,
        "share/padding": round(1 - result.num_tokens / max(1, result.num_padded_tokens), 4),
        "share/encoded_twice": result.share_encoded_twice,
        "share/masked": result.share_masked,
        "compiled": run.compiling.compiles,
        "spread": result.spread,
        "time/step_s": round(seconds, 4),
        "time/data_s": round(run.data_s, 5),
        "time/encode_s": round(result.encode_s, 4),
        "time/loss_s": round(result.loss_s, 4),
        "time/backward_s": round(result.backward_s, 4),
        "memory/peak_gib": round(peak_memory_gib(run.world), 3),
        "negatives/version": state.negatives_version,
        "negatives/age_steps": None if mined_at is None else state.step - 1 - mined_at,
    }
    run.metrics.record(state.step, values)
    eta_s = state.seconds / state.step * num_left
    run.status.update(
        phase="training", step=state.step, loss=result.loss, eta_s=eta_s, swaps=state.swaps,
        tokens_per_rank_per_s=values["tokens_per_rank_per_s"], negatives_age_steps=values["negatives/age_steps"],
        skipped=state.num_skipped, temperature_at_bound=run.is_at_bound,
    )  # fmt: skip
    if run.world.speaks:
        log.info(
            "step %d/%d  loss %.4f  gradient %.3f  %.0f tokens/s a rank  %.1f GiB",
            state.step, run.num_steps, result.loss, grad_norm, tokens_per_s, values["memory/peak_gib"],
        )  # fmt: skip


def stop(run: Training) -> Outcome:
    """Save a run that was asked to stop, and say so. Raises what kept its last checkpoint from being written. Collective."""
    run.saver.wait()
    log.info("step %d: asked to stop; saving", run.state.step)
    save(run)
    run.saver.wait()
    run.world.barrier()  # a launcher ends the other ranks as soon as one leaves
    run.status.update(phase="stopped")
    log.info("stopped at step %d of %d as asked; the same command goes on from here", run.state.step, run.num_steps)
    return Outcome(finished=False, step=run.state.step, evaluations=evaluations(run.job))


def peak_memory_gib(world: World) -> float:
    """Return the most memory this process has held: on its GPU, or of the host."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
