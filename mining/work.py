"""The state of a running service that all versions share, and how it reports its progress."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from mining.figures import ages, version_figures
from mining.find.embeddings import TokenCache
from mining.find.index import load_faiss
from mining.job import MineJob
from mining.publish import claim_negatives, last_version
from mining.ranks import Ranks
from mining.settings import EXACT
from mining.sources import changed_files, claim_data
from mining.state import Refresh, write_refresh
from mining.table.clusters import check_clusters
from mining.table.doubts import mining_defeats
from mining.table.judgements import Judgements, read_judgements
from mining.table.rerank import Reranker, open_reranker
from mining.watch import HOLDER, PIN_S, Task, Watch
from trainer.data.datasets import RetrievalData, open_data
from trainer.encoder.auto import device_in_words, encode_on
from trainer.encoder.device import choose_device
from trainer.encoder.gpu_share import keep_to_share
from trainer.errors import InputError, MachineFailed
from trainer.handoff.claim import Claim, claim_side
from trainer.handoff.heartbeat import BEAT_S, beating
from trainer.handoff.manifest import pin, unpin
from trainer.handoff.pins import Pins
from trainer.metrics import Metrics, MetricsFile, NoMetrics, NoStatus, Status
from trainer.warned import Warnings

log = logging.getLogger(__name__)


FIRST_GIVES_WAY_S = 20.0  # to a checkpoint; of fewer seconds is version 0 of a small corpus, and worth having
ENCODING = "encoding"  # the phase that a newer checkpoint may end


@dataclass
class Work:
    """What the phases of a service share."""

    job: MineJob
    ranks: Ranks
    claim: Claim  # this start's place in the run folder
    status: Status | NoStatus
    metrics: Metrics
    data: RetrievalData
    judgements: Judgements
    tokens: TokenCache
    watch: Watch
    device: torch.device
    files: dict[str, str]  # of the data as it was opened: SHA-256 by path
    reranker: Reranker | None
    done_digest: str | None  # weights that need no mining: those mined last, or refused
    warnings: Warnings
    task: Task | None = None  # what is being made
    settled_version: int | None = None  # one that gives way to no newer checkpoint: it has done so before, or was resumed
    without_words: bool = False  # version 0 is not made: it takes too long, or a checkpoint came sooner
    num_refused: int = 0
    has_fit: bool = False  # the disk has held what is planned, on rank 0
    pins: Pins = field(default_factory=Pins)  # on the embeddings of the version at work; rank 0 holds them for all
    seconds: dict[str, float] = field(default_factory=dict)  # its phases so far
    _phase: tuple[str, float, dict[str, int]] = ("", 0.0, {})  # name, beginning, amounts of work
    _pinning: threading.Lock = field(default_factory=threading.Lock)
    _pinned_at: float = 0.0
    _looked_at: float = 0.0
    _told: frozenset[str] = frozenset()

    def begin(self, task: Task) -> None:
        """Start on a version."""
        self.task, self.seconds = task, {}
        self._looked_at = time.monotonic() + FIRST_GIVES_WAY_S if task.checkpoint is None else 0.0
        self.tell_changed_data()

    @contextlib.contextmanager
    def phase(self, name: str, **amounts: int) -> Iterator[None]:
        """Write into the status and the state which phase begins, and record its seconds when it ends.

        amounts: of work for all ranks together, such as tokens=1000; rates are computed from them.
        """
        assert self.task is not None
        checkpoint, started = self.task.checkpoint, time.monotonic()
        step = None if checkpoint is None else checkpoint.step
        self._phase = name, started, amounts
        self.status.update(phase=name, version=self.task.version, checkpoint_step=step, done=0, total=None)
        if checkpoint is not None and self.ranks.speaks:
            refresh = Refresh(self.task.version, checkpoint.folder.name, checkpoint.manifest["weights_digest"])
            with self.warning("a service that starts now would not finish this version first"):
                write_refresh(self.job.run.folder, refresh, name)
        with beating(self.keep_alive, BEAT_S) if self.ranks.speaks else contextlib.nullcontext():
            yield
        self.seconds[name] = round(time.monotonic() - started, 3)
        rates = self._rates(1.0)
        self.status.update(**rates)
        figures = {"phase": name, "version": self.task.version, "seconds": self.seconds[name], **rates}
        self.metrics.record(step or 0, {"event": "phase", **figures, **self.ages()})

    def progress(self, done: int, total: int) -> None:
        """Report how far a phase is on this rank; raises Superseded if it is less than half done and a newer checkpoint is
        there.
        """
        self.status.update(done=done, total=total, **self._rates(done / max(1, total)))
        self.keep_alive()
        if self.ranks.speaks and 2 * done < total and self._is_superseded():
            self.ranks.call_off()

    def keep_alive(self) -> None:
        """Write the heartbeat and renew the pin on the checkpoint at work. From any thread."""
        self.status.update()
        checkpoint = self.task and self.task.checkpoint
        with self._pinning:
            if self.ranks.speaks and checkpoint and time.monotonic() - self._pinned_at > PIN_S / 4:
                self._pinned_at = time.monotonic()
                with self.warning(f"the pin on {checkpoint.folder} is not renewed"):
                    pin(checkpoint.folder, HOLDER, PIN_S)
        if self.ranks.speaks:
            with self.warning("the pins on embeddings are not renewed"):
                self.pins.renew()

    def finish(self, is_done: bool = True) -> None:
        """Unpin the checkpoint; is_done: it was mined or refused, and is not looked at again."""
        if self.task is not None and self.task.checkpoint is not None and self.ranks.speaks:
            if is_done:
                self.done_digest = self.task.checkpoint.manifest["weights_digest"]
            else:
                self.watch.look_again()
            unpin(self.task.checkpoint.folder, HOLDER)
        self.task = None

    def ages(self) -> dict[str, int]:
        """Return how old the work is, in the trainer's steps."""
        return ages(self.job.run.folder, self.status.values)

    def tell_changed_data(self) -> None:
        """Say which files of the data are no longer what they were when they were opened."""
        changed = frozenset(changed_files(self.files, self.job)) if self.ranks.speaks else self._told
        if changed - self._told:
            log.warning(
                "%s changed since this service opened the data; it goes on with the texts as they were (data %s…), "
                "as a trainer does that has opened them",
                ", ".join(sorted(changed)), self.data.digest[:12],
            )  # fmt: skip
        self._told = changed

    @contextlib.contextmanager
    def warning(self, effect: str) -> Iterator[None]:
        """Log the effect where a small file cannot be written in the block, and go on."""
        try:
            yield
        except (InputError, MachineFailed, OSError) as error:
            log.warning("%s: %s", effect, error)

    def _rates(self, share: float) -> dict[str, float]:
        _, started, amounts = self._phase
        seconds = max(1e-9, time.monotonic() - started)
        return {f"{unit}_per_s": round(amount * share / seconds, 1) for unit, amount in amounts.items() if amount}

    def _is_superseded(self) -> bool:
        assert self.task is not None
        checkpoint, version = self.task.checkpoint, self.task.version
        now = time.monotonic()
        may_be = not self.task.is_only if checkpoint is None else self._phase[0] == ENCODING
        if not may_be or version == self.settled_version or self.task.is_given:
            return False
        if now - self._looked_at < self.job.mine.poll_s:
            return False
        self._looked_at = now
        return self.watch.is_superseded(checkpoint)


def open_work(job: MineJob, ranks: Ranks, claim: Claim) -> Work:
    """Return a service that is ready to work. Collective. Raises InputError for data that cannot be used."""
    run = job.run.folder
    status: Status | NoStatus = Status(run, "miner", claim.check) if ranks.speaks else NoStatus()
    status.update(phase="starting", started=time.time())
    ranks.on_wait = status.update
    with beating(status.update, BEAT_S):
        data = ranks.together(lambda: open_data(job.data, job.sources))
        files = ranks.decide(lambda: claim_data(job, data))
        judgements = ranks.together(lambda: read_judgements(data, job.data.train_split))
    if job.index.factory != EXACT:
        ranks.together(lambda: load_faiss(job.index.factory))  # a missing FAISS is reported before the corpus is encoded
    sizes = judgements.num_queries, len(data.corpus)
    ranks.decide(lambda: check_clusters(job.clusters, judgements.num_queries))
    ranks.decide(lambda: claim_negatives(run, *sizes))
    last = last_version(run, *sizes) if ranks.speaks else None
    local_rank = ranks.local_rank()
    device = ranks.together(lambda: choose_device(job.encode.device, local_rank))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where kernels of our own are launched
    keep_to_share(device, os.environ)
    job = settle_encoding(job, device)
    metrics: Metrics = MetricsFile(run / "logs" / "miner.jsonl") if ranks.speaks else NoMetrics()
    work = Work(
        job=job,
        ranks=ranks,
        claim=claim,
        status=status,
        metrics=metrics,
        data=data,
        judgements=judgements,
        tokens=TokenCache(data, judgements.query_rows),
        watch=Watch(job),
        files=files,
        device=device,
        reranker=ranks.together(lambda: open_reranker(job.rerank, data, judgements.query_rows, device)),
        done_digest=None if last is None else last.manifest.get("weights_digest"),
        warnings=Warnings(status, metrics),
    )
    for kind, sentence in mining_defeats(job, len(data.corpus)).items():
        work.warnings.tell(kind, sentence, None)
    status.update(num_refused=0, **({} if last is None else version_figures(last.manifest)))
    ranks.on_wait = work.keep_alive
    return work


def settle_encoding(job: MineJob, device: torch.device) -> MineJob:
    """Return the job with what "auto" stands for in section encode on a device, and say so."""
    encode = encode_on(job.encode, device)
    if encode != job.encode:
        log.info("encode.dtype=%s and encode.stored=%s on %s", encode.dtype, encode.stored, device_in_words(device))
    return replace(job, encode=encode)


@contextlib.contextmanager
def claim_run(job: MineJob, ranks: Ranks) -> Iterator[Claim]:
    """Hold the miner's place in the run folder. Collective; raises InputError if a live miner holds it."""
    claim = ranks.decide(lambda: claim_side(job.run.folder, "miner"))
    try:
        yield claim
    finally:
        claim.release()
