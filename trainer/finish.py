"""What a run ends with: its best checkpoint tested, its last one beside it where that is another, and a verdict."""

import logging

from trainer.handoff.manifest import TornVersion
from trainer.handoff.weights import ENCODER, Checkpoint, checkpoint_name, checkpoints_folder, open_checkpoint, write_best
from trainer.milestones import evaluate_on_dev, evaluate_once
from trainer.prepare import Training
from trainer.results import write_results
from trainer.scores import forget_scores

log = logging.getLogger(__name__)


def finish(run: Training) -> None:
    """Test what came of a run, judge it, and say so in the log, the status and `results.json`. Collective. Raises Stopped."""
    evaluate_on_dev(run)  # which a start that was asked to stop there may have left out
    run.saver.wait()
    best = run.world.decide(lambda: better_than_last(run))
    if best is None:
        evaluate_once(run, "trained")
    else:
        evaluate_once(run, "last")
        evaluate_once(run, "trained", best)
    if run.world.speaks:
        judge(run, best)


def better_than_last(run: Training) -> Checkpoint | None:
    """Return the best checkpoint on dev where it is not the last one, and whole. Rank 0 only."""
    step = run.state.early_stop.best_step
    if step is None or step == run.state.step:
        return None
    try:
        return open_checkpoint(checkpoints_folder(run.job.run.folder) / checkpoint_name(step), ENCODER)
    except TornVersion as torn:
        log.warning("step %d was the best on dev, and its checkpoint cannot be tested: %s", step, torn)
        return None


def judge(run: Training, best: Checkpoint | None) -> None:
    """Say whether the model has become better. Rank 0 only."""
    job, folder, state = run.job, run.job.run.folder, run.state
    if best is None:
        forget_scores(folder, "last")
    if state.early_stop.best_step is not None:
        write_best(folder, state.step if best is None else best.step)
    run.status.update(swaps=state.swaps)  # a run that was finished before has done no step that tells them
    run.status.flush()  # whose figures go in
    found = write_results(folder, job.eval.split, job.stop.measure)["verdict"]
    run.status.update(verdict=found)
    tell = log.warning if found["level"] == "worse" else log.info
    tell("%s", found["sentence"])
    if best is not None:
        log.info("the model is the checkpoint of step %d, the best on dev; the last is of step %d", best.step, state.step)
