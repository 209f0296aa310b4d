"""A service at work: what stays the same from version to version, and how it tells the outside."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from mining.encode import TokenCache
from mining.job import MineJob
from mining.judgements import Judgements, read_judgements
from mining.publish import claim_negatives, last_version
from mining.ranks import Ranks
from mining.state import Refresh, write_refresh
from mining.watch import HOLDER, PIN_S, Task, Watch
from trainer.data.datasets import RetrievalData, open_data
from trainer.handoff.claim import Claim, claim_side
from trainer.handoff.manifest import pin, unpin
from trainer.metrics import Metrics, MetricsFile, NoMetrics, NoStatus, Status


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
    done_digest: str | None  # weights that need no mining: those mined last, or refused
    task: Task | None = None  # what is being made
    seconds: dict[str, float] = field(default_factory=dict)  # its phases so far
    _pinned_at: float = 0.0

    def begin(self, task: Task) -> None:
        """Start on a version."""
        self.task, self.seconds = task, {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tell the status and the state which phase begins, and keep its seconds when it is through."""
        assert self.task is not None
        checkpoint, started = self.task.checkpoint, time.monotonic()
        step = None if checkpoint is None else checkpoint.step
        self.status.update(phase=name, version=self.task.version, checkpoint_step=step, done=0, total=None)
        if checkpoint is not None and self.ranks.speaks:
            refresh = Refresh(self.task.version, checkpoint.folder.name, checkpoint.manifest["weights_digest"])
            write_refresh(self.job.run.folder, refresh, name)
        yield
        self.seconds[name] = round(time.monotonic() - started, 3)

    def progress(self, done: int, total: int) -> None:
        """Tell how far a phase is on this rank."""
        self.status.update(done=done, total=total)
        self.keep_alive()

    def keep_alive(self) -> None:
        """Write the heartbeat and renew the pin on the checkpoint at work."""
        self.status.update()
        if self.ranks.speaks and self.task and self.task.checkpoint and time.monotonic() - self._pinned_at > PIN_S / 4:
            self._pinned_at = time.monotonic()
            pin(self.task.checkpoint.folder, HOLDER, PIN_S)

    def finish(self) -> None:
        """Let go of the checkpoint, mined or refused."""
        if self.task is not None and self.task.checkpoint is not None and self.ranks.speaks:
            self.done_digest = self.task.checkpoint.manifest["weights_digest"]
            unpin(self.task.checkpoint.folder, HOLDER)
        self.task = None


def open_work(job: MineJob, ranks: Ranks, claim: Claim) -> Work:
    """Return a service that is ready to work. Collective. Raises InputError for data that cannot be used."""
    run = job.run.folder
    status: Status | NoStatus = Status(run, "miner", claim.check) if ranks.speaks else NoStatus()
    status.update(phase="starting", started=time.time())
    ranks.on_wait = status.update
    data = ranks.together(lambda: open_data(job.data, job.sources))
    judgements = ranks.together(lambda: read_judgements(data, job.data.train_split))
    sizes = judgements.num_queries, len(data.corpus)
    ranks.decide(lambda: claim_negatives(run, *sizes))
    last = last_version(run, *sizes) if ranks.speaks else None
    local_rank, num_gpus = ranks.local_rank(), torch.cuda.device_count()
    work = Work(
        job=job,
        ranks=ranks,
        claim=claim,
        status=status,
        metrics=MetricsFile(run / "logs" / "miner.jsonl") if ranks.speaks else NoMetrics(),
        data=data,
        judgements=judgements,
        tokens=TokenCache(data, judgements.query_rows),
        watch=Watch(job),
        device=torch.device("cuda", local_rank % num_gpus) if num_gpus else torch.device("cpu"),
        done_digest=None if last is None else last.manifest.get("weights_digest"),
    )
    ranks.on_wait = work.keep_alive
    return work


@contextlib.contextmanager
def claim_run(job: MineJob, ranks: Ranks) -> Iterator[Claim]:
    """Hold the miner's place in the run folder. Collective; raises InputError if a live miner holds it."""
    claim = ranks.decide(lambda: claim_side(job.run.folder, "miner"))
    try:
        yield claim
    finally:
        claim.release()
