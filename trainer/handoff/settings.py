"""The sections of a job that both sides of a run read."""

from dataclasses import dataclass
from pathlib import Path

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

    path: Path = Path("data/code")  # a folder in BEIR's form
    cache: Path | None = None  # Arrow tables and token ids; None: negpool in the user's cache folder
    train_split: str = "train"  # qrels/NAME.tsv


@dataclass(frozen=True, kw_only=True)
class NegativesSettings:
    """Section `negatives`: how the trainer takes over what the miner publishes."""

    per_query: int = 1  # hard negatives drawn from the table for each query and step; 0: in-batch negatives only
    first_wait_s: float = 120.0  # seconds to wait for version 0 before the first step; then in-batch negatives only
    # Swaps fixed beforehand, in order, so that a run can be repeated to the bit: the trainer waits for each, and the
    # miner mines exactly these checkpoints. Empty: each version comes into force as soon as every rank has verified it.
    schedule: tuple[ScheduleEntry, ...] = ()

    def __post_init__(self) -> None:
        if self.per_query < 0:
            raise InputError(f"negatives.per_query={self.per_query} is negative; expected 0 or more")
        for earlier, later in zip(self.schedule, self.schedule[1:], strict=False):
            if not (earlier.step < later.step and earlier.checkpoint <= later.checkpoint):
                raise InputError("negatives.schedule is not in order: steps must rise from entry to entry")
        for entry in self.schedule:
            if entry.checkpoint > entry.step:
                raise InputError(
                    f"negatives.schedule asks at step {entry.step} for negatives of the later checkpoint "
                    f"{entry.checkpoint}; checkpoint must be at most step"
                )
