"""The mining service: watch, encode, index, audit, search, publish, and again.

Neither it nor the trainer waits for the other; they exchange files through the run folder. It may be killed at any moment:
embeddings that are on disk stay, and the version that was being made (see version.py) is made again, with the same bytes.
"""

import logging
import sys
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Literal

from mining.exporter import serve_figures
from mining.find.words_plan import foresee_words
from mining.job import MineJob
from mining.publish import next_number
from mining.ranks import GivenUp, Ranks, Stopped, Superseded
from mining.refresh import mine_bm25, mine_checkpoint
from mining.state import forget_refresh, read_refresh
from mining.watch import Task
from mining.work import Work, claim_run, open_work
from trainer.encoder.shards import prune_shards
from trainer.errors import TOLD, InputError, MachineFailed, exit_code
from trainer.handoff.manifest import TornVersion, disk_error, is_disk_error
from trainer.handoff.retry import patiently
from trainer.handoff.weights import Checkpoint
from trainer.interrupt import Interrupt
from trainer.metrics import read_status

if TYPE_CHECKING:
    from mpi4py import MPI

    from mining.alone import Alone

log = logging.getLogger(__name__)

How = Literal["finished", "stopped"]
NAP_S = 0.1  # how soon a waiting service hears that it should stop


def run_service(
    job: MineJob,
    comm: "MPI.Comm | Alone",
    *,
    once: bool = False,
    checkpoint: str | None = None,
    metrics_port: int | None = None,
) -> How:
    """Mine until the trainer is done ("finished") or until asked to stop ("stopped"), by SIGTERM or SIGINT.

    once: make version 0 if there is none, and one version from the newest checkpoint unless it is mined; then leave.
    checkpoint: name of the one to mine once, whether it was mined before or not.
    metrics_port: where Prometheus finds the figures, on this machine's loopback; 0: any free port, which is said.
    Raises one of TOLD, on one rank, and the others exit with its code: InputError for a job, data or a folder that cannot be
    used, MachineFailed for a disk that fails at the start or in a single refresh; in a service that only delays a version. Any
    other error of one rank ends all. Collective: every rank of comm calls it.
    """
    ranks = Ranks(comm, Interrupt().is_set)
    try:
        how = _serve(job, ranks, once or checkpoint is not None, checkpoint, metrics_port)
        ranks.leave()
        return how
    except BaseException as caught:
        error = _told(caught, job)
        if isinstance(caught, GivenUp) and not ranks.speaks:
            error = SystemExit(exit_code(error))  # one sentence is enough
        if ranks.num_ranks > 1 and not ranks.has_agreed_on_error and not isinstance(caught, GivenUp):
            if isinstance(error, TOLD):
                print(f"negpool: {error}", file=sys.stderr)
            elif not isinstance(error, SystemExit):
                traceback.print_exc()
            ranks.abort(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else exit_code(error))
        if error is caught:
            raise
        raise error from caught


def _told(caught: BaseException, job: MineJob) -> BaseException:
    """Return the error to show: the cause, where all ranks gave up together, and a sentence for what a disk refused."""
    if isinstance(caught, GivenUp):
        return caught.cause
    if is_disk_error(caught) and not isinstance(caught, TOLD):
        return disk_error(caught, getattr(caught, "filename", None) or job.run.folder)
    return caught


def _serve(job: MineJob, ranks: Ranks, once: bool, checkpoint: str | None, metrics_port: int | None) -> How:
    with claim_run(job, ranks) as claim:
        work = open_work(job, ranks, claim)
        foresee_words(work, ranks.decide(lambda: next_version(work) == 0), is_only=once)
        if metrics_port is not None:
            ranks.decide(lambda: serve_figures(job.run.folder, work.status.values, metrics_port))
        how: How = "finished"
        try:
            while (task := found_task(work, once, checkpoint)) is not None:
                is_done = make_version(work, task)
                if once and task.checkpoint is not None and is_done:
                    break
        except Stopped:
            how = "stopped"
        finally:
            work.pins.let_go()
        work.status.update(phase=how, done=None, total=None)
        work.status.close()
        work.metrics.close()
        return how


def make_version(work: Work, task: Task) -> bool:
    """Make a version; return whether its checkpoint is done with, because the version was published or refused for good.
    Collective.
    """
    work.begin(task)
    cause: Exception | None = None
    try:
        if task.checkpoint is None:
            mine_bm25(work, task)
        else:
            mine_checkpoint(work, task, task.checkpoint)
    except GivenUp as given_up:
        cause = given_up.cause
    # Done for published and for refused versions, because both leave embeddings of the whole corpus.
    work.ranks.decide(partial(prune_embeddings, work))
    is_done = cause is None or work.ranks.decide(partial(give_up, work, task, cause))
    work.finish(is_done)
    return is_done


def prune_embeddings(work: Work) -> None:
    """Let go of the embeddings of a version, and delete those that are too old. Rank 0 only."""
    with work.warning("old embeddings stay until the next version"):
        work.pins.let_go()
        prune_shards(work.job.run.folder / "shards", work.job.mine.keep_encodings)


def found_task(work: Work, once: bool, given: str | None) -> Task | None:
    """Return what `next_task` finds, on every rank; a service waits for a disk that fails meanwhile. Collective."""
    while True:
        try:
            return work.ranks.decide(lambda: next_task(work, once, given))
        except GivenUp as given_up:
            if once or not isinstance(given_up.cause, MachineFailed):
                raise
            work.ranks.decide(partial(wait_for_disk, work, given_up.cause))


def wait_for_disk(work: Work, failure: Exception) -> None:
    """Say what the disk refused, and wait before it is asked again. Rank 0 only; raises Stopped."""
    log.warning("%s; the service asks again", failure)
    work.status.update(phase="waiting for the disk", done=None, total=None)
    _nap(work)


def next_task(work: Work, once: bool, given: str | None) -> Task | None:
    """Wait for something to mine and return it, or None when all is done. Rank 0 only; raises Stopped."""
    job, run = work.job, work.job.run.folder
    if (version := next_version(work)) == 0:
        return Task(0, None, is_only=once)
    if given is not None:
        if job.negatives.schedule:
            raise InputError("--checkpoint has no place in a run whose negatives.schedule says what is mined; leave one out")
        return Task(version, checked(work, work.watch.take(given)), is_given=True)
    while True:
        begun = read_refresh(run)
        checkpoint = work.watch.look(version, work.done_digest, begun, takes_final=once)
        if checkpoint is not None:
            if begun is not None and (begun.version, begun.checkpoint) == (version, checkpoint.folder.name):
                work.settled_version = version  # a killed service's: it is finished first
            return Task(version, checked(work, checkpoint), is_only=once)
        # After the trainer's last step no negatives are needed any more. A trainer that was killed or stopped has not written
        # that it is done, and may be started again.
        trainer = read_status(run, "trainer")
        if once or trainer.get("phase") == "finished" or trainer.get("training_done"):
            log.info("nothing more to mine: %s", "no new checkpoint" if once else f"trained to step {trainer.get('step')}")
            return None
        work.status.update(phase="watching", done=None, total=None)
        _nap(work)


def next_version(work: Work) -> int:
    """Return the number of the next version. Rank 0 only."""
    return next_number(work.job.run.folder, with_bm25=work.job.mine.bm25_top_k > 0 and not work.without_words)


def _nap(work: Work) -> None:
    next_look = time.monotonic() + work.job.mine.poll_s
    while time.monotonic() < next_look:
        work.ranks.check_stop()
        time.sleep(NAP_S)


def checked(work: Work, checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint that was trained on this service's data; raises InputError for another."""
    trained_on = checkpoint.manifest.get("data_digest", work.data.digest)
    if trained_on != work.data.digest:
        raise InputError(
            f"{checkpoint.folder} was not trained on what {work.data.path} holds (data {trained_on[:12]}… instead of "
            f"{work.data.digest[:12]}…); give the data back what it held, or set data.path or run.folder"
        )
    return checkpoint


def give_up(work: Work, task: Task, cause: Exception) -> bool:
    """Say why a version is not made, and return whether its weights are refused for good. Rank 0 only.

    With a schedule, or a checkpoint that a person named, there is nothing to go on with, and InputError is raised; but a
    scheduled checkpoint that is gone may come again, from a trainer that was killed and resumed. So it is for a single refresh,
    unless another checkpoint may take the place of one that is gone or older.
    """
    job, checkpoint = work.job, task.checkpoint
    if isinstance(cause, MachineFailed):
        return give_up_for_now(work, task, cause)
    if checkpoint is None and isinstance(cause, Superseded):
        work.without_words = True
        reason = "a checkpoint came before half of version 0 from BM25 was made, and is mined instead"
        log.info("%s", reason)
        work.metrics.record(0, {"event": "given up", "version": task.version, "reason": reason})
        return True
    if checkpoint is None:
        raise InputError(f"version 0 from BM25 is no good: {cause}")
    reason = f"checkpoint {checkpoint.folder.name}: {cause}"
    is_lost = isinstance(cause, TornVersion)
    patiently(lambda: forget_refresh(job.run.folder), f"{job.run.folder}")
    if task.is_given or (job.negatives.schedule and not is_lost):
        wanted = "--checkpoint" if task.is_given else f"negatives.schedule needs version {task.version}, but"
        raise InputError(f"{wanted} {reason}")
    if isinstance(cause, Superseded):
        work.settled_version = task.version
        log.info("%s gives way to a newer one", reason)
    else:
        log.warning("negatives v%d not published: %s", task.version, reason)
        work.num_refused += 1
        work.status.update(refused=reason, num_refused=work.num_refused)
    work.metrics.record(checkpoint.step, {"event": "given up", "version": task.version, "reason": reason})
    is_done = not (is_lost or isinstance(cause, Superseded))
    if is_done and task.is_only:
        work.status.update(phase="refused")
        raise InputError(f"nothing was published: {reason}")
    return is_done


def give_up_for_now(work: Work, task: Task, cause: MachineFailed) -> bool:
    """Say that the machine failed, and return False: the same version is made when it is well again. Rank 0 only.

    A single refresh ends, with MachineFailed.
    """
    if task.is_only or task.is_given:
        raise cause
    log.warning("negatives v%d not published: %s; the service tries again", task.version, cause)
    work.status.update(refused=str(cause))
    _nap(work)
    return False
