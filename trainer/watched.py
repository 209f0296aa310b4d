"""A run under watch: what its steps and evaluations warn of, and how a collapse ends it.

The rules are in symptoms.py and collapse.py; here they are given the run's figures. Rank 0 tells; what ends a run is decided
alike on all ranks.
"""

import contextlib
import logging
from collections.abc import Mapping

from trainer.collapse import LEAST_SPREAD, in_words
from trainer.errors import InputError, MachineFailed, MustNotGoOn
from trainer.handoff.weights import read_best, steps_on_disk, write_best
from trainer.last_good import last_good
from trainer.measures import MEASURE_TITLES
from trainer.own_numbers import defeats
from trainer.prepare import Training
from trainer.results import write_results
from trainer.scores import Scores, read_scores, write_scores
from trainer.symptoms import NARROW, has_lost, narrowing, rank_lost
from trainer.verdict import compare

log = logging.getLogger(__name__)

UNTRAINED, BEST_ON_DEV = "dev/untrained", "dev/best"


def warn_of_job(run: Training) -> None:
    """Warn of what the job's own numbers defeat."""
    for kind, sentence in defeats(run.job, run.num_steps, len(run.data.corpus)).items():
        run.warnings.tell(kind, sentence, None)


def warn_of_step(run: Training, grad_norm: float, spread: float | None) -> None:
    """Warn of gradients and embeddings of the step that was just done, and of negatives that do not come."""
    step, warnings, widest = run.state.step, run.warnings, run.collapse.widest
    for kind, sentence in run.gradients.observe(grad_norm).items():
        warnings.tell(kind, sentence, step)
    if spread is not None:
        is_narrow = run.narrowing.observe(spread < NARROW * widest)
        warnings.tell("embeddings_narrow", narrowing(spread, widest) if is_narrow else None, step)
    warnings.tell("negatives_late", _late(run), step)


def _late(run: Training) -> str | None:
    """Return a sentence where half of the steps are done without negatives that a model has mined, and some were asked for."""
    settings, mined = run.job.negatives, run.feed.in_force
    is_asked = settings.per_query != 0 and not settings.schedule and run.data.given is None
    if not is_asked or 2 * run.state.step < run.num_steps or (mined is not None and mined.checkpoint_step is not None):
        return None
    now = "in-batch negatives only" if mined is None else "the negatives of BM25"
    return (
        f"half of the {run.num_steps} steps are done with {now}, and none that a miner has found with the model; see whether a "
        "miner is at work, set checkpoint.every_steps lower, or train for longer"
    )


def keep_on_dev(run: Training, name: str, found: Scores) -> None:
    """Keep an evaluation on dev that later ones are compared with; a disk that refuses it ends no run."""
    if not run.world.speaks:
        return
    try:
        write_scores(run.job.run.folder, name, found)
    except (InputError, MachineFailed) as error:
        log.warning("later evaluations on dev are not compared with this one: %s", error)


def warn_of_dev(run: Training, found: Scores, is_best: bool) -> None:
    """Warn where dev is clearly below the untrained model or well below its best, or embeddings use few dimensions."""
    if not run.world.speaks:
        return
    folder, measure, step = run.job.run.folder, run.job.stop.measure, run.state.step
    if is_best:
        keep_on_dev(run, BEST_ON_DEV, found)
    untrained, best = read_scores(folder, UNTRAINED), read_scores(folder, BEST_ON_DEV)
    if untrained is None or best is None or {untrained.split, best.split} != {found.split}:
        return  # another split decided before, or an older version began this run

    now, top, first = (scores.measures[measure] for scores in (found, best, untrained))
    words = f"{MEASURE_TITLES[measure]} on {found.split} is {now:.3f}"
    is_below = compare(found.of_each(measure), untrained.of_each(measure)) == "worse"
    below = f"{words}, less than the untrained model's {first:.3f}; set a lower optim.lr"
    run.warnings.tell("dev_below_untrained", below if is_below else None, step)
    has_fallen = has_lost(now, top, first) and compare(found.of_each(measure), best.of_each(measure)) == "worse"
    fallen = f"{words}, and was {top:.3f} at its best, at step {best.step}, which is kept; stop.patience ends such a run"
    run.warnings.tell("dev_below_best", fallen if has_fallen else None, step)
    run.warnings.tell("embeddings_low_rank", rank_lost(found.shape, untrained.shape), step)


def check_collapsed(run: Training, spread: float | None) -> None:
    """Raise MustNotGoOn, on every rank alike, where all texts have come to nearly one embedding. Collective then.

    spread: of the step's embeddings, made by the weights of before its update.
    """
    if not run.collapse.observe(spread):
        return
    assert spread is not None
    steps = run.collapse.num_steps
    found = (
        f"for {steps} steps all texts have nearly one embedding, with a mean cosine of {1 - spread:.3f}, and "
        f"{1 - run.collapse.widest:.3f} where they were furthest apart"
    )
    raise _collapsed(run, run.state.step, found, run.state.step - steps - 1)


def check_health(run: Training, step: int, shape: Mapping[str, float]) -> None:
    """Raise MustNotGoOn, on every rank alike, where training has given all evaluated texts one embedding. Collective.

    step: of the weights. shape: of the evaluation's embeddings, on rank 0; of the wider side, as all texts of one may be equal.
    """
    spread = run.world.broadcast(shape.get("spread", 1.0))
    if spread >= LEAST_SPREAD:
        return
    found = f"all evaluated texts have nearly one embedding, with a mean cosine of {1 - spread:.4f}"
    before = step - run.collapse.num_steps - 1 if run.collapse.num_steps else 0
    raise _collapsed(run, step, found, max(before, run.state.early_stop.best_step or 0))


def _collapsed(run: Training, step: int, found: str, good_step: int) -> MustNotGoOn:
    """Return the error of a run that has collapsed, after its last good checkpoint was named in its place. Collective.

    found: what the embeddings are like. good_step: the last one that is known to be good.
    """
    run.saver.wait()
    folder = run.job.run.folder
    sentence = in_words(step, found, last_good(folder, good_step), run.job.optim.lr)
    if run.world.speaks:
        good = [each for each in steps_on_disk(folder) if each <= good_step]
        run.warnings.tell("collapsed", sentence, step)
        run.status.flush()
        with contextlib.suppress(InputError, MachineFailed):  # the run ends for a better reason
            if good and read_best(folder) is None:
                write_best(folder, good[-1])
            write_results(folder, run.job.eval.split, run.job.stop.measure, collapsed=sentence)
    return MustNotGoOn(sentence)
