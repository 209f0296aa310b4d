"""The sections of a job that both sides of a run read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.errors import InputError
from trainer.handoff.negatives import ScheduleEntry
from trainer.metrics import TRACKERS


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Section `run`: where the run lives, and its one source of chance."""

    folder: Path = Path("runs/default")  # checkpoints, negatives, logs; shared by trainer and miner
    seed: int = 0  # of the order of data, dropout and sampling
    trackers: tuple[str, ...] = ("tensorboard",)  # of the trainer's figures: tensorboard, wandb, mlflow; JSON lines always

    def __post_init__(self) -> None:
        for name in self.trackers:
            if name not in TRACKERS:
                raise InputError(f"run.trackers names {name!r}, expected {', '.join(TRACKERS)}")
        if len(set(self.trackers)) < len(self.trackers):
            raise InputError(f"run.trackers={list(self.trackers)} names one twice")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Section `data`: what is trained on, mined from and evaluated with."""

    path: Path = Path("data/code")  # BEIR's form, a saved data set, record files, or a name of the hub; unused with sources
    cache: Path | None = None  # Arrow tables and token ids; None: negpool in the user's cache folder
    train_split: str = "train"  # qrels/NAME.tsv, or the files named so
    num_proc: int | None = None  # processes that tokenise; None: one for each core, 16 at most, and one for few texts

    def __post_init__(self) -> None:
        if self.num_proc is not None and self.num_proc < 1:
            raise InputError(f"data.num_proc={self.num_proc} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """Section `sources.NAME`: one of several data sets that are trained on together. None: what the job says elsewhere."""

    path: Path  # as data.path
    id_prefix: str = ""  # before its ids, where another source has the same for other texts
    weight: float = 1.0  # how often its queries come, for once in an epoch; not in batch.mode "tasks"
    query_prefix: str | None = None  # before its queries, an instruction perhaps
    passage_prefix: str | None = None
    max_query_tokens: int | None = None
    max_passage_tokens: int | None = None
    batch: int | None = None  # its queries in one step, over all ranks; not in batch.mode "mixed"
    temperature: float | None = None
    objective: str | None = None
    loss_weight: float = 1.0  # of its loss in a step of several sources

    def __post_init__(self) -> None:
        positive = ("weight", "max_query_tokens", "max_passage_tokens", "batch", "temperature", "loss_weight")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"sources: {name}={value} of {self.path} must be more than 0")


Sources = dict[str, SourceSettings]  # by name, in the order of the job file


@dataclass(frozen=True, kw_only=True)
class NegativesSettings:
    """Section `negatives`: how the trainer takes over what the miner publishes."""

    # hard negatives drawn from the table for each query and step; 0: in-batch negatives only
    per_query: int | Literal["all"] = 1
    first_wait_s: float = 120.0  # seconds to wait for version 0 before the first step; then in-batch negatives only
    max_age_steps: int | None = None  # steps since the checkpoint that the negatives in force were mined from; None: any age
    # older ones are said, or not used (in-batch negatives only), or newer ones are waited for, first_wait_s at most
    when_stale: Literal["warn", "fallback", "wait"] = "warn"
    # Swaps fixed beforehand, in order, so that a run can be repeated to the bit: the trainer waits for each, and the
    # miner mines exactly these checkpoints. Empty: each version comes into force as soon as every rank has verified it.
    schedule: tuple[ScheduleEntry, ...] = ()

    def __post_init__(self) -> None:
        if self.per_query != "all" and self.per_query < 0:
            raise InputError(f'negatives.per_query={self.per_query} is negative; expected 0 or more, or "all"')
        if self.max_age_steps is not None and self.max_age_steps < 1:
            raise InputError(f"negatives.max_age_steps={self.max_age_steps} must be at least 1; leave it out for any age")
        for earlier, later in zip(self.schedule, self.schedule[1:], strict=False):
            if not (earlier.step < later.step and earlier.checkpoint <= later.checkpoint):
                raise InputError("negatives.schedule is not in order: steps must rise from entry to entry")
        for entry in self.schedule:
            if entry.checkpoint > entry.step:
                raise InputError(
                    f"negatives.schedule asks at step {entry.step} for negatives of the later checkpoint "
                    f"{entry.checkpoint}; checkpoint must be at most step"
                )
