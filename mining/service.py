"""The mining service: watch, encode, index, audit, search, publish, and again.

It never waits for the trainer nor the trainer for it; they meet in the run folder. It may be killed at any moment: what
was encoded stays, and the version that was being made is made again, to the same bytes. Recall is audited before the
search over all queries, so that a bad index costs a sample and not a refresh.
"""

import logging
import sys
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from mining.audit import audit_recall, audit_sample
from mining.bm25 import index_bm25, search_bm25, text_keys
from mining.encode import Embeddings, encode_missing, open_sides
from mining.exporter import serve_figures
from mining.figures import version_figures
from mining.index import EXACT, IndexSettings, ShardIndex, build_indexes
from mining.job import MineJob
from mining.publish import next_number, publish
from mining.ranks import GivenUp, Ranks, Refused, Stopped, Superseded
from mining.refresh import Drawn, Retrieve, draw_negatives
from mining.search import best_positive_scores, search_shards, share_of
from mining.state import forget_refresh, read_refresh
from mining.watch import Task
from mining.work import ENCODING, Work, claim_run, open_work
from trainer.encoder.model import Encoder
from trainer.encoder.tokens import TokenTable
from trainer.errors import InputError
from trainer.handoff.manifest import TornVersion, disk_error, is_disk_error
from trainer.handoff.weights import ENCODER, Checkpoint, open_checkpoint
from trainer.interrupt import Interrupt
from trainer.metrics import read_status

if TYPE_CHECKING:
    from mpi4py import MPI

log = logging.getLogger(__name__)

How = Literal["finished", "stopped"]
NAP_S = 0.1  # how soon a waiting service hears that it should stop


def run_service(
    job: MineJob,
    comm: "MPI.Comm",
    *,
    once: bool = False,
    checkpoint: str | None = None,
    metrics_port: int | None = None,
) -> How:
    """Mine until the trainer is done ("finished") or until asked to stop ("stopped"), by SIGTERM or SIGINT.

    once: make version 0 if there is none, and one version from the newest checkpoint unless it is mined; then leave.
    checkpoint: name of the one to mine once, whether it was mined before or not.
    metrics_port: where Prometheus finds the figures, on this machine's loopback; 0: any free port, which is said.
    Raises InputError for a job, data or a disk that cannot be used, on one rank; the others exit with code 2. Any other
    error of one rank ends all. Collective: every rank of comm calls it.
    """
    ranks = Ranks(comm, Interrupt().is_set)
    try:
        how = _serve(job, ranks, once or checkpoint is not None, checkpoint, metrics_port)
        ranks.leave()
        return how
    except BaseException as caught:
        place = getattr(caught, "filename", None) or job.run.folder
        error = disk_error(caught, place) if is_disk_error(caught) and not isinstance(caught, InputError) else caught
        if ranks.num_ranks > 1 and not ranks.has_agreed_on_error:
            is_refusal = isinstance(error, InputError | SystemExit)
            if is_refusal:
                print(f"negpool: {error}", file=sys.stderr)
            else:
                traceback.print_exc()
            ranks.abort(2 if is_refusal else 1)
        if error is caught:
            raise
        raise error from caught


def _serve(job: MineJob, ranks: Ranks, once: bool, checkpoint: str | None, metrics_port: int | None) -> How:
    with claim_run(job, ranks):
        work = open_work(job, ranks)
        if metrics_port is not None:
            ranks.decide(lambda: serve_figures(job.run.folder, work.status.values, metrics_port))
        how: How = "finished"
        try:
            while (task := ranks.decide(lambda: next_task(work, once, checkpoint))) is not None:
                is_done = make_version(work, task)
                if once and task.checkpoint is not None and is_done:
                    break
        except Stopped:
            how = "stopped"
        work.status.update(phase=how, done=None, total=None)
        work.metrics.close()
        return how


def make_version(work: Work, task: Task) -> bool:
    """Make a version and return whether its weights need no other look: published, or refused for good. Collective."""
    work.begin(task)
    is_done = True
    try:
        if task.checkpoint is None:
            mine_bm25(work, task)
        else:
            mine_checkpoint(work, task, task.checkpoint)
    except GivenUp as given_up:
        is_done = work.ranks.decide(partial(give_up, work, task, given_up.cause))
    work.finish(is_done)
    return is_done


def next_task(work: Work, once: bool, given: str | None) -> Task | None:
    """Wait for something to mine and return it, or None when all is done. Rank 0 only; raises Stopped."""
    job, run = work.job, work.job.run.folder
    version = next_number(run, with_bm25=job.mine.bm25_top_k > 0)
    if version == 0:
        return Task(0, None)
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
            return Task(version, checked(work, checkpoint))
        # Nobody will take what could still be mined after the trainer's last step. One that was killed or stopped has not
        # said that it is done, and may come back.
        trainer = read_status(run, "trainer")
        if once or trainer.get("phase") == "finished" or trainer.get("training_done"):
            log.info("nothing more to mine: %s", "no new checkpoint" if once else f"trained to step {trainer.get('step')}")
            return None
        work.status.update(phase="watching", done=None, total=None)
        next_look = time.monotonic() + job.mine.poll_s
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


def mine_bm25(work: Work, task: Task) -> None:
    """Publish a version from BM25, before there is any model. Collective; raises Stopped on all."""
    ranks, judgements, top_k = work.ranks, work.judgements, work.job.mine.bm25_top_k
    with work.phase("searching with BM25", queries=judgements.num_queries):
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
    with work.phase("loading"):
        encoder, pooling, tables = ranks.together(lambda: read_encoder(work, checkpoint))
        sides = ranks.together(lambda: open_sides(job.run.folder, checkpoint, encoder, pooling, tables))
        num_tokens = sum(int(tokens.lengths[shards.rows(i)].sum()) for shards, tokens in sides for i in shards.missing())
    with work.phase(ENCODING, tokens=num_tokens):
        encode_missing(ranks, encoder.to(work.device), sides, work.progress)
    queries, passages = (Embeddings(shards) for shards, _ in sides)
    with work.phase("indexing"):
        ranks.together(lambda: [table.shard(i) for table in (queries, passages) for i in range(table.shards.num_shards)])
        indexes = build(work, job.index, passages)
    recall = 1.0
    if job.index.factory != EXACT:
        with work.phase("auditing"):
            places = audit_sample(job.audit, job.run.seed, task.version, judgements.query_rows)
            exact = build(work, IndexSettings(factory=EXACT), passages)
            recall = audit_recall(ranks, indexes, exact, queries.read(places), job.search.top_k)
    if recall < job.audit.min_recall:
        ranks.decide(partial(refuse_recall, job, recall))

    def retrieve(tile: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        query_QD = queries.read(np.arange(tile.start, tile.stop))
        scores, ids = search_shards(ranks, indexes, query_QD, job.search.top_k)
        share = share_of(len(query_QD), ranks.rank, ranks.num_ranks)
        indptr = judgements.positive_indptr[tile.start + share.start : tile.start + share.stop + 1]
        rows = judgements.positive_rows[indptr[0] : indptr[-1]]
        return scores, ids, best_positive_scores(query_QD[share], passages, indptr - indptr[0], rows)

    with work.phase("searching", queries=judgements.num_queries):
        drawn = draw(work, task, (tables[1].key_of_row, tables[0].key_of_row), retrieve)
    publish_drawn(work, task, drawn, recall)


def read_encoder(work: Work, checkpoint: Checkpoint) -> tuple[Encoder, str, list[TokenTable]]:
    """Return the encoder of a checkpoint, its pooling, and the tokens of queries and passages; raises TornVersion.

    Verified once more when it is read, on every rank: in between it may have been altered, or deleted in spite of its pin.
    """
    try:
        found = work.tokens.open(checkpoint)
    except Exception:
        open_checkpoint(checkpoint.folder, ENCODER)  # a better reason for whatever the libraries made of it
        raise
    open_checkpoint(checkpoint.folder, ENCODER)
    return found


def build(work: Work, settings: IndexSettings, passages: Embeddings) -> list[ShardIndex]:
    """Return the indexes of this rank's shards. Collective: an error of one is an error of all."""
    shards = range(work.ranks.rank, passages.shards.num_shards, work.ranks.num_ranks)
    device = work.device.index or 0
    return work.ranks.together(lambda: build_indexes(settings, passages, shards, work.judgements.allowed_N, device))


def draw(work: Work, task: Task, keys: tuple[np.ndarray, np.ndarray], retrieve: Retrieve) -> Drawn | None:
    """Return the negatives of all queries on rank 0: search, filter, sample. Collective."""
    job, chance = work.job, (work.job.run.seed, task.version)
    return draw_negatives(job.filter, job.sample, *chance, work.ranks, work.judgements, keys, retrieve, work.progress)


def publish_drawn(work: Work, task: Task, drawn: Drawn | None, recall: float | None) -> None:
    """Publish on rank 0 and tell about it. Collective."""
    checkpoint = task.checkpoint

    def tell_and_publish() -> None:
        assert drawn is not None
        manifest = publish(work.job, task.version, checkpoint, work.judgements, drawn, work.data.digest, recall, work.seconds)
        kept = {key: manifest[key] for key in ("version", "source", "num_negatives", "held_out", "audit", "seconds")}
        dropped = manifest["filter"]["dropped"]
        work.status.update(**version_figures(manifest))
        figures = {"event": "published", **kept, "dropped": dropped, **work.ages()}
        work.metrics.record(checkpoint.step if checkpoint else 0, figures)
        log.info(
            "negatives v%d published from %s: %d for %d queries; dropped %s; %.1f s",
            task.version, f"step {checkpoint.step}" if checkpoint else "BM25", len(drawn.ids),
            work.judgements.num_queries, dropped, sum(work.seconds.values()),
        )  # fmt: skip

    with work.phase("publishing"):
        work.ranks.decide(tell_and_publish)


def refuse_recall(job: MineJob, recall: float) -> None:
    """Raise Refused for an index that finds too little."""
    raise Refused(
        f"index.factory={job.index.factory} finds {recall:.3f} of the exact neighbours, less than "
        f"audit.min_recall={job.audit.min_recall}; set index.nprobe higher, or index.factory to exact"
    )


def give_up(work: Work, task: Task, cause: Exception) -> bool:
    """Say why a version is not made, and return whether its weights are refused for good. Rank 0 only.

    With a schedule, or a checkpoint that a person named, there is nothing to go on with, and InputError is raised; but a
    scheduled checkpoint that is gone may come again, from a trainer that was killed and resumed.
    """
    job, checkpoint = work.job, task.checkpoint
    assert checkpoint is not None
    reason = f"checkpoint {checkpoint.folder.name}: {cause}"
    is_lost = isinstance(cause, TornVersion)
    forget_refresh(job.run.folder)
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
    return not (is_lost or isinstance(cause, Superseded))
