"""The sections of a job that both sides of a run read."""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.errors import InputError
from trainer.ranges import job_section

Mode = Literal["mixed", "homogeneous", "tasks"]  # how the queries of several sources share the batches
Parameters = dict[str, bool | int | float | str]  # of an objective, by name
Gather = Literal["auto", "passages", "queries"]
Which = Literal["lowest", "best", "each"]  # of a query's positives, the one that its negatives are held to
Margin = float | Literal["off"]


@job_section
class RunSettings:
    """Section `run`: where the run lives, and its one source of chance."""

    folder: Path = Path("runs/default")
    """Checkpoints, negatives, logs; shared by trainer and miner."""
    seed: NonNegativeInt = 0
    """Seed of the order of data, of dropout and of sampling."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where the trainer's figures go beside the JSON lines, which are always written."""

    def __post_init__(self) -> None:
        if len(set(self.trackers)) < len(self.trackers):
            raise InputError(f"run.trackers={list(self.trackers)} names one twice")


@job_section
class DataSettings:
    """Section `data`: what is trained on, mined from and evaluated with."""

    path: Path = Path("data/code")
    """A folder of a collection as BEIR has it, a saved data set, record files, or a name of the hub; unused with sources."""
    cache: Path | None = None
    """Arrow tables and token ids; None: negpool in the user's cache folder."""
    train_split: str = "train"
    """The split that is trained on: qrels/NAME.tsv, or the files named so."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of the files under the names that we read: {query = "question", positive = "answer"}."""
    strict: bool = False
    """Refuse files with blemishes, which otherwise are left out or read otherwise, counted and said: see docs/data.md."""
    ignore_identical_ids: bool = True
    """Never find a document for the query that has the same id, unless it is judged relevant, as BEIR does."""
    num_proc: PositiveInt | None = None
    """Processes that tokenise; None: one for each core, 16 at most, and one for few texts."""


@job_section
class SourceSettings:
    """Section `sources.NAME`: one of several data sets that are trained on together. None: what the job says elsewhere."""

    path: Path
    """As data.path."""
    columns: dict[str, str] | None = None
    """As data.columns."""
    id_prefix: str = ""
    """Text before its ids, where another source has the same for other texts."""
    weight: PositiveFloat = 1.0
    """How often its queries come, for once in an epoch; not in batch.mode "tasks"."""
    query_prefix: str | None = None
    """Text before its queries, an instruction perhaps."""
    passage_prefix: str | None = None
    """Text before its passages."""
    max_query_tokens: PositiveInt | None = None
    """As model.max_query_tokens."""
    max_passage_tokens: PositiveInt | None = None
    """As model.max_passage_tokens."""
    batch: PositiveInt | None = None
    """Its queries in one step, over all ranks; not in batch.mode "mixed"."""
    temperature: PositiveFloat | None = None
    """As loss.temperature."""
    objective: str | None = None
    """As loss.objective."""
    parameters: Parameters | None = None
    """As loss.parameters, of its own objective."""
    loss_weight: PositiveFloat = 1.0
    """Weight of its loss in a step of several sources."""


Sources = dict[str, SourceSettings]  # by name, in the order of the job file


def columns_of(settings: DataSettings, source: SourceSettings) -> Mapping[str, str]:
    """Return the columns by which a source is read."""
    return settings.columns if source.columns is None else source.columns


def places_of(settings: DataSettings, sources: Sources) -> list[tuple[Path, Mapping[str, str]]]:
    """Return the path of each data set of a job, with the columns by which it is read."""
    return [(source.path, columns_of(settings, source)) for source in sources.values()] or [(settings.path, settings.columns)]


@job_section
class ScheduleEntry:
    """One fixed swap: negatives of the checkpoint at one step come into force at another."""

    checkpoint: NonNegativeInt
    """Step of the checkpoint to mine."""
    step: NonNegativeInt
    """First step that uses the negatives mined from it."""


@job_section
class NegativesSettings:
    """Section `negatives`: how the trainer takes over what the miner publishes."""

    per_query: NonNegativeInt | Literal["all"] = 1
    """Hard negatives drawn from the table for each query and step; 0: in-batch negatives only."""
    first_wait_s: NonNegativeFloat = 120.0
    """Seconds to wait for version 0 before the first step; then in-batch negatives only."""
    max_age_steps: PositiveInt | None = None
    """Steps since the checkpoint that the negatives in force were mined from; None: any age."""
    when_stale: Literal["warn", "fallback", "wait"] = "warn"
    """Older ones are said, or not used (in-batch negatives only), or newer ones are waited for, first_wait_s at most."""
    schedule: tuple[ScheduleEntry, ...] = ()
    """Swaps fixed beforehand, in order, so that a run can be repeated to the bit: the trainer waits for each, and the miner
    mines exactly these checkpoints. Empty: each version comes into force as soon as every rank has verified it.
    """

    def __post_init__(self) -> None:
        for earlier, later in zip(self.schedule, self.schedule[1:], strict=False):
            if not (earlier.step < later.step and earlier.checkpoint <= later.checkpoint):
                raise InputError("negatives.schedule is not in order: steps must rise from entry to entry")
        for entry in self.schedule:
            if entry.checkpoint > entry.step:
                raise InputError(
                    f"negatives.schedule asks at step {entry.step} for negatives of the later checkpoint "
                    f"{entry.checkpoint}; checkpoint must be at most step"
                )
