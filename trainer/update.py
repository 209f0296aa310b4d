"""The update that ends a step, and what becomes of a run whose gradients or embeddings are not finite.

One broken gradient costs one update, many in a row end the run: clipping would multiply every gradient by NaN, AdamW would
write it into all weights and moments, and whatever is published or resumed from them would be lost.
"""

import logging
import math

import numpy as np
import torch

from gradcache import NotFinite
from trainer.errors import InputError, MustNotGoOn
from trainer.last_good import last_good
from trainer.optim import set_learning_rate
from trainer.prepare import Training

log = logging.getLogger(__name__)


def update(run: Training) -> float:
    """Clip, step the optimizers, and return the norm of the encoder's gradient before clipping. Collective.

    Where a gradient of the encoder or of what the loss learns is not finite, none of them nor the average moves, on any rank: the
    step is left out, and counted. An overflow of float16 is such a step, behind which the scaler takes a smaller scale.
    All that the host has to know of the step is read in one wait for the device; behind it the update runs by itself.
    """
    state, optim, factor = run.state, run.job.optim, run.lr_factor(run.state.step)
    temperature = state.temperature
    learnt = [p for p in (temperature.log_scale, *state.objective_parameters().values()) if p.grad is not None]
    gradients = [p.grad.abs().sum() for p in learnt if p.grad is not None]  # the same on every rank
    set_learning_rate(state.parallel.optimizer, optim.lr * factor)
    watched = [temperature.log_scale.detach(), temperature.is_at_bound(), *gradients]
    norm, is_made, (log_scale, is_at_bound, *_) = state.parallel.update(
        state.scaler, torch.stack([values.double() for values in watched])
    )
    if learnt:
        set_learning_rate(state.loss_optimizer, optim.temperature_lr * factor)
        state.scaler.unscale_(state.loss_optimizer)
        torch.nn.utils.clip_grad_norm_(learnt, optim.max_grad_norm)
        if is_made:  # their gradients are known to be finite, which the scaler would wait for to see
            state.loss_optimizer.step()
        state.loss_optimizer.zero_grad(set_to_none=True)
        temperature.bound()
    state.count_update(is_made)
    state.scaler.update()
    if is_made:
        state.average.update()
    else:
        log.warning("step %d: a gradient is not finite; its update is left out, %d so far", state.step, state.num_skipped)
    if is_at_bound and not run.is_at_bound:
        log.warning("step %d: the temperature has fallen to loss.min_temperature=%g", state.step, run.job.loss.min_temperature)
    run.temperature, run.is_at_bound = math.exp(-log_scale), bool(is_at_bound)
    return norm


def check_skipped(run: Training) -> None:
    """Raise MustNotGoOn, on every rank alike, behind too many updates in a row that were left out. Collective then."""
    state, optim = run.state, run.job.optim
    if state.skipped_in_row < optim.max_skipped:
        return
    run.saver.wait()
    raise MustNotGoOn(
        f"step {state.step}: {state.skipped_in_row} updates in a row were left out, because their gradients are not finite, and "
        f"optim.max_skipped is {optim.max_skipped}; {last_good(run.job.run.folder, state.step - state.skipped_in_row)}; set a "
        "lower optim.lr or a wider precision.encode, and go on from there in a new run.folder"
    )


def not_finite(run: Training, error: NotFinite) -> Exception:
    """Return the error that ends a run whose encoder gives a text NaN or infinity. Collective.

    Its update cannot be left out as one with a broken gradient is: weights stay what they are then, evaluation and mining need
    every text, and each start would come to this one again. Before the first update nothing but the job is at fault.
    """
    sentence = f"step {run.state.step}: {_name_text(run, error)}"
    if run.state.step == 0:
        return InputError(sentence)
    run.saver.wait()
    return MustNotGoOn(f"{sentence}; {last_good(run.job.run.folder)}")


def _name_text(run: Training, error: NotFinite) -> str:
    """Return a broken embedding's error with the text's id in the place of its key."""
    data, dataset = run.data, run.dataset
    queries = data.training_queries(run.job.data.train_split)
    keys, names = (dataset.query_keys, data.queries.select(queries)) if error.is_query else (dataset.passage_keys, data.corpus)
    found = np.flatnonzero(keys == error.key)
    return str(error).replace(f"key {error.key}", f"id {names[int(found[0])]['_id']!r}") if len(found) else str(error)
