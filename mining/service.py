"""The mining service: watch, encode, index, audit, search, publish, and again.

It never waits for the trainer nor the trainer for it; they meet in the run folder. It may be killed at any moment: what
was encoded stays, and the version that was being made is made again, to the same bytes. Recall is audited before the
search over all queries, so that a bad index costs a sample and not a refresh.
"""

import logging
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mining.bm25 import index_bm25, search_bm25, text_keys
from mining.encoded import encode_checkpoint
from mining.indexed import Indexed, index_passages
from mining.job import MineJob
from mining.publish import next_number, publish
from mining.ranks import Ranks, Stopped
from mining.refresh import Drawn, Retrieve, draw_negatives
from mining.search import QUERY_TILE, best_positive_scores, search_shards, share_of
from mining.state import read_refresh
from mining.watch import Task
from mining.work import Work, claim_run, open_work
from trainer.errors import InputError
from trainer.handoff.weights import Checkpoint
from trainer.interrupt import Interrupt
from trainer.metrics import read_status

if TYPE_CHECKING:
    from mpi4py import MPI

log = logging.getLogger(__name__)

How = Literal["finished", "stopped"]
NAP_S = 0.1  # how soon a waiting service hears that it should stop


def run_service(job: MineJob, comm: "MPI.Comm", *, once: bool = False) -> How:
    """Mine until the trainer is done ("finished") or until asked to stop ("stopped"), by SIGTERM or SIGINT.

    once: make version 0 if there is none, and one version from the newest checkpoint unless it is mined; then leave.
    Raises InputError for a job or data that cannot be used, on one rank; the others exit with code 2. Any other error
    of one rank ends all. Collective: every rank of comm calls it.
    """
    ranks = Ranks(comm, Interrupt().is_set)
    try:
        how = _serve(job, ranks, once)
        ranks.leave()
        return how
    except (InputError, SystemExit) as error:
        if not ranks.has_agreed_on_error and ranks.num_ranks > 1:
            print(f"negpool: {error}", file=sys.stderr)
            ranks.abort(2)
        raise
    except BaseException:
        if ranks.num_ranks > 1:
            traceback.print_exc()
            ranks.abort(1)
        raise


def _serve(job: MineJob, ranks: Ranks, once: bool) -> How:
    with claim_run(job, ranks):
        work = open_work(job, ranks)
        how: How = "finished"
        try:
            while (task := ranks.decide(lambda: next_task(work, once))) is not None:
                work.begin(task)
                if task.checkpoint is None:
                    mine_bm25(work, task)
                else:
                    mine_checkpoint(work, task, task.checkpoint)
                work.finish()
                if once and task.checkpoint is not None:
                    break
        except Stopped:
            how = "stopped"
        work.status.update(phase=how, done=None, total=None)
        work.metrics.close()
        return how


def next_task(work: Work, once: bool) -> Task | None:
    """Wait for something to mine and return it, or None when all is done. Rank 0 only; raises Stopped."""
    job, run = work.job, work.job.run.folder
    version = next_number(run, with_bm25=job.mine.bm25_top_k > 0)
    if version == 0:
        return Task(0, None)
    while True:
        checkpoint = work.watch.look(version, work.done_digest, read_refresh(run), takes_final=once)
        if checkpoint is not None:
            if checkpoint.manifest.get("data_digest", work.data.digest) != work.data.digest:
                raise InputError(f"{checkpoint.folder} was not trained on {work.data.path}; set data.path or run.folder")
            return Task(version, checkpoint)
        # Nobody will take what could still be mined after the trainer's last step.
        trainer = read_status(run, "trainer")
        if once or trainer.get("phase") == "finished" or trainer.get("training_done"):
            return None
        work.status.update(phase="watching", done=None, total=None)
        next_look = time.monotonic() + job.mine.poll_s
        while time.monotonic() < next_look:
            work.ranks.check_stop()
            time.sleep(NAP_S)


def mine_bm25(work: Work, task: Task) -> None:
    """Publish a version from BM25, before there is any model. Collective; raises Stopped on all."""
    ranks, judgements, top_k = work.ranks, work.judgements, work.job.mine.bm25_top_k
    with work.phase("searching with BM25"):
        # One index in memory, whatever the number of ranks; it takes seconds where encoding takes minutes.
        index = index_bm25(work.data) if ranks.speaks else None
        keys = text_keys(work.data.corpus), text_keys(work.data.queries.select(judgements.query_rows))

        def retrieve(tile: slice) -> tuple[np.ndarray, np.ndarray, None]:
            parts: list = [None] * ranks.num_ranks
            if index is not None:
                rows = judgements.query_rows[tile]
                scores, ids = search_bm25(index, work.data, rows, top_k, judgements.allowed_N)
                shares = [share_of(len(rows), rank, ranks.num_ranks) for rank in range(ranks.num_ranks)]
                parts = [(scores[share], ids[share]) for share in shares]
            return *ranks.exchange(parts)[0], None

        drawn = draw(work, task, keys, retrieve)
    publish_drawn(work, task, drawn, recall=None)


def mine_checkpoint(work: Work, task: Task, checkpoint: Checkpoint) -> None:
    """Publish a version from a checkpoint, or refuse it for its index's recall. Collective; raises Stopped on all."""
    job, ranks, judgements = work.job, work.ranks, work.judgements
    with work.phase("encoding"):
        encoded = encode_checkpoint(work, task, checkpoint)
    queries, passages = encoded.queries, encoded.passages
    indexed = index_passages(work, task, encoded)
    if indexed.recall < job.audit.min_recall:
        ranks.decide(lambda: refuse(work, task, checkpoint, indexed))
        return

    def retrieve(tile: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        query_QD = queries.read(np.arange(tile.start, tile.stop))
        scores, ids = search_shards(ranks, indexed.indexes, query_QD, job.search.top_k)
        share = share_of(len(query_QD), ranks.rank, ranks.num_ranks)
        indptr = judgements.positive_indptr[tile.start + share.start : tile.start + share.stop + 1]
        rows = judgements.positive_rows[indptr[0] : indptr[-1]]
        return scores, ids, best_positive_scores(query_QD[share], passages, indptr - indptr[0], rows)

    with work.phase("searching"):
        drawn = draw(work, task, (encoded.passage_keys, encoded.query_keys), retrieve, encoded.plan.query_tile)
    about = {"index": indexed.about(), "passages": encoded.about_passages, "memory": encoded.plan.as_json()}
    publish_drawn(work, task, drawn, indexed.recall, about)
    if ranks.speaks:
        indexed.centroids.prune()


def draw(work: Work, task: Task, keys: tuple[np.ndarray, np.ndarray], retrieve: Retrieve, tile: int = QUERY_TILE) -> Drawn | None:
    """Return the negatives of all queries on rank 0: search, filter, sample. Collective."""
    job, chance = work.job, (work.job.run.seed, task.version)
    return draw_negatives(job.filter, job.sample, *chance, work.ranks, work.judgements, keys, retrieve, work.progress, tile)


def publish_drawn(work: Work, task: Task, drawn: Drawn | None, recall: float | None, about: dict[str, Any] | None = None) -> None:
    """Publish on rank 0 and tell about it; about: more for the manifest. Collective."""
    checkpoint = task.checkpoint

    def tell_and_publish() -> None:
        assert drawn is not None
        manifest = publish(
            work.job, task.version, checkpoint, work.judgements, drawn, work.data.digest, recall, work.seconds, about or {}
        )
        kept = {key: manifest[key] for key in ("version", "source", "num_negatives", "held_out", "audit", "seconds")}
        dropped = manifest["filter"]["dropped"]
        work.metrics.record(checkpoint.step if checkpoint else 0, {"event": "published", **kept, "dropped": dropped})
        log.info(
            "negatives v%d published from %s: %d for %d queries; dropped %s; %.1f s",
            task.version, f"step {checkpoint.step}" if checkpoint else "BM25", len(drawn.ids),
            work.judgements.num_queries, dropped, sum(work.seconds.values()),
        )  # fmt: skip

    with work.phase("publishing"):
        work.ranks.decide(tell_and_publish)


def refuse(work: Work, task: Task, checkpoint: Checkpoint, indexed: Indexed) -> None:
    """Say why a version is not published; with a schedule there is nothing to go on with, and InputError is raised."""
    job, recall = work.job, indexed.recall
    reason = (
        f"index.factory={indexed.settings.factory} finds {recall:.3f} of the exact neighbours of checkpoint {checkpoint.step}, "
        f"less than audit.min_recall={job.audit.min_recall}; set index.nprobe higher, or index.factory to exact"
    )
    if job.negatives.schedule:
        raise InputError(f"negatives.schedule needs version {task.version}, but {reason}")
    log.warning("negatives v%d not published: %s", task.version, reason)
    work.status.update(refused=reason)
    work.metrics.record(checkpoint.step, {"event": "refused", "version": task.version, "recall": recall, "reason": reason})
