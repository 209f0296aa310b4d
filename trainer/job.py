"""What a training run is told: the sections of a job file that the trainer reads."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gradcache import OBJECTIVES
from gradcache.widths import check_widths
from trainer.data.sampler import Mode
from trainer.early_stop import StopSettings
from trainer.encoder.model import ModelSettings
from trainer.errors import InputError
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings, Sources, SourceSettings

# Of a source's settings, those that say nothing in a mode.
IDLE_IN_MODE: dict[Mode, tuple[str, ...]] = {
    "mixed": ("batch", "temperature", "objective", "loss_weight"),
    "homogeneous": (),
    "tasks": ("weight",),
}


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """Section `batch`."""

    queries: int = 128  # queries of one step over all ranks
    # of several sources: queries of all in a batch, one source for each batch, or a batch of every source in each step
    mode: Mode = "mixed"
    avoid_duplicates: bool = False  # keep equal queries, and those that share a positive, out of each other's batch
    # Batches are made of whole clusters of training queries: "mined" ones, that the miner publishes and each epoch takes
    # over, or those of an .npz file. None: random batches.
    clusters: Literal["mined"] | Path | None = None


@dataclass(frozen=True, kw_only=True)
class ChunkSettings:
    """Section `chunk`: memory of a step."""

    tokens: int | Literal["auto"] = "auto"  # padded tokens encoded at once on a rank; memory follows this, not the batch
    keep_graphs: int | Literal["all", "auto"] = "auto"  # chunks that need no second forward: more memory, less time
    memory_gib: float | None = None  # of a rank, for what is "auto"; None: the GPU's free memory; a CPU: 4096 tokens, 0 graphs


Backend = Literal["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Section `parallel`: how several ranks share one model."""

    backend: Backend = "ddp"
    reduce: Literal["step", "chunk"] = "step"  # chunk: fsdp2, zero2 and zero3 keep shards of gradients, for more traffic
    deepspeed: Path | None = None  # zero0 to zero3: a JSON file of DeepSpeed's own settings; launch/deepspeed/ has some
    offload: bool = False  # zero1 to zero3: the optimizer, and with zero3 the parameters, in the host's memory

    def __post_init__(self) -> None:
        if self.reduce == "chunk" and self.backend not in ("fsdp2", "zero2", "zero3"):
            raise InputError(
                f'parallel.reduce="chunk" saves nothing with parallel.backend="{self.backend}", which keeps whole gradients; '
                'set parallel.reduce="step", or parallel.backend to fsdp2, zero2 or zero3'
            )
        if self.deepspeed is not None and not self.backend.startswith("zero"):
            raise InputError(f'parallel.deepspeed is for parallel.backend zero0 to zero3, found "{self.backend}"')
        if self.offload and self.backend not in ("zero1", "zero2", "zero3"):
            raise InputError(f'parallel.offload=true needs parallel.backend zero1, zero2 or zero3, found "{self.backend}"')


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Section `loss`."""

    objective: str = "info_nce"  # a name in gradcache.OBJECTIVES
    symmetric: bool = False  # also passage -> query, mean of both directions
    same_side: bool = False  # a direction's own side as negatives, too: query-query, and symmetric passage-passage
    tile_rows: int | None = None  # rows of scores at once; None: as many as fit a fixed memory
    temperature: float = 0.05  # divides the scores
    learn_temperature: bool = False
    widths: tuple[int, ...] | None = None  # falling: the mean of the losses of embeddings cut to so many components
    width_weights: tuple[float, ...] | None = None  # of that mean; None: equal ones

    def __post_init__(self) -> None:
        try:
            if self.widths is not None:
                check_widths(self.widths, self.width_weights)
        except ValueError as error:
            raise InputError(f"loss.{error}") from error
        if self.widths is None and self.width_weights is not None:
            raise InputError(f"loss.width_weights={list(self.width_weights)} weighs nothing; set loss.widths, too")

    def check_model(self, width: int) -> None:
        """Raise InputError if embeddings of a width cannot be cut as asked for."""
        if self.widths is not None and self.widths[0] > width:
            raise InputError(f"loss.widths begins with {self.widths[0]}, and the model's embeddings have {width} components")


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings:
    """Section `precision`. Weights, gradients, the loss and its sums are float32 in any case."""

    encode: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast of the encoder; fp16 comes with a loss scaler
    products: Literal["fp32", "bf16"] = "fp32"  # embeddings gathered and multiplied in: bf16 halves traffic
    tf32: bool = False  # float32 products of a GPU in TensorFloat-32: faster, 10 bits of mantissa


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Section `optim`: AdamW, with a linear warm-up."""

    lr: float = 2e-5
    temperature_lr: float = 1e-2  # of the logarithm of 1 / temperature, when it is learnt
    weight_decay: float = 0.01  # not on biases and norms
    max_grad_norm: float = 1.0  # of the encoder's gradient; the temperature's is clipped by itself
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"  # what follows the warm-up, as transformers has it
    warmup_share: float = 0.1  # of all steps
    epochs: float = 1.0  # passes over the training queries; unused when steps is set
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class EmaSettings:
    """Section `ema`: a moving average of the weights; evaluated and published in their place."""

    decay: float | None = None  # share of the average that stays with each step, as 0.999; None: no average

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise InputError(f"ema.decay={self.decay} must lie between 0 and 1, as 0.999 does; leave it out for no average")


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Section `checkpoint`."""

    every_steps: int = 200  # also after the last step
    keep: int = 3  # newest ones kept; pinned ones stay, and the best one on dev if there is an evaluation at its step
    keep_every_steps: int | None = None  # of these steps all are kept


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Section `eval`: before the first step, after the last one and in between, with the corpus sharded over the ranks."""

    split: str = "test"  # qrels/NAME.tsv, before and after; an absent one is said and skipped
    dev_split: str = "dev"  # in between, and what section stop decides by
    every_steps: int | None = None  # in between; None: never


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that the trainer is told."""

    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    sources: Sources = field(default_factory=dict)  # several data sets, instead of data.path
    model: ModelSettings = field(default_factory=ModelSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    chunk: ChunkSettings = field(default_factory=ChunkSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    negatives: NegativesSettings = field(default_factory=NegativesSettings)
    stop: StopSettings = field(default_factory=StopSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)

    def __post_init__(self) -> None:
        positive = {
            "batch.queries": self.batch.queries,
            "chunk.tokens": 1 if self.chunk.tokens == "auto" else self.chunk.tokens,
            "chunk.memory_gib": 1 if self.chunk.memory_gib is None else self.chunk.memory_gib,
            "loss.tile_rows": 1 if self.loss.tile_rows is None else self.loss.tile_rows,
            "loss.temperature": self.loss.temperature,
            "optim.lr": self.optim.lr,
            "optim.max_grad_norm": self.optim.max_grad_norm,
            "optim.epochs": self.optim.epochs,
            "optim.steps": 1 if self.optim.steps is None else self.optim.steps,
            "checkpoint.every_steps": self.checkpoint.every_steps,
            "checkpoint.keep": self.checkpoint.keep,
            "checkpoint.keep_every_steps": self.checkpoint.keep_every_steps or 1,
            "eval.every_steps": self.eval.every_steps or 1,
        }
        for name, value in positive.items():
            if not value > 0:
                raise InputError(f"{name}={value} must be more than 0")
        if isinstance(self.chunk.keep_graphs, int) and self.chunk.keep_graphs < 0:
            raise InputError(f'chunk.keep_graphs={self.chunk.keep_graphs} must be 0 or more, "all" or "auto"')
        _check_objective("loss.objective", self.loss.objective)
        if self.precision.encode == "fp16" and self.parallel.backend != "ddp":
            raise InputError(
                f'precision.encode="fp16" needs a loss scaler, which parallel.backend="{self.parallel.backend}" has none for; '
                'set precision.encode="bf16" or parallel.backend="ddp"'
            )
        if self.run.seed < 0:
            raise InputError(f"run.seed={self.run.seed} must be 0 or more")
        if self.stop.needs_evaluations and self.eval.every_steps is None:
            raise InputError("section stop decides by evaluations on dev, and there are none; set eval.every_steps")
        if self.ema.decay is not None and self.parallel.backend == "zero3":
            raise InputError('ema.decay cannot be used with parallel.backend="zero3"; set zero2 or fsdp2')
        age = self.negatives.max_age_steps
        if self.negatives.when_stale == "wait" and age is not None and age < 2 * self.checkpoint.every_steps:
            raise InputError(
                f'negatives.max_age_steps={age} with when_stale="wait" would wait for checkpoints that are not written yet; '
                f"set it to {2 * self.checkpoint.every_steps} or more, or checkpoint.every_steps lower"
            )
        if self.batch.clusters == "mined" and self.batch.mode == "tasks":
            raise InputError(
                'batch.clusters="mined" needs one epoch for all sources, and with batch.mode="tasks" each has its own; '
                'set batch.mode to "mixed" or "homogeneous", or batch.clusters to a file'
            )
        self._check_schedule()
        self._check_sources()

    def _check_schedule(self) -> None:
        for entry in self.negatives.schedule:
            if entry.checkpoint % self.checkpoint.every_steps:
                raise InputError(
                    f"negatives.schedule names checkpoint {entry.checkpoint}, which is never written; "
                    f"choose multiples of checkpoint.every_steps={self.checkpoint.every_steps}"
                )

    def _check_sources(self) -> None:
        mode, idle = self.batch.mode, IDLE_IN_MODE[self.batch.mode]
        for name, source in self.sources.items():
            if source.objective is not None:
                _check_objective(f"sources.{name}.objective", source.objective)
            for key in idle:
                value = getattr(source, key)
                if value != getattr(SourceSettings(path=source.path), key):
                    others = " or ".join(f'"{other}"' for other, keys in IDLE_IN_MODE.items() if key not in keys)
                    raise InputError(
                        f'sources.{name}.{key}={value!r} has no effect with batch.mode="{mode}"; '
                        f"set batch.mode to {others}, or take it away"
                    )


def _check_objective(setting: str, objective: str) -> None:
    if objective not in OBJECTIVES:
        near = difflib.get_close_matches(objective, OBJECTIVES, n=2, cutoff=0.4) or list(OBJECTIVES)
        raise InputError(f"{setting}={objective!r} is unknown; did you mean {' or '.join(near)}?")
