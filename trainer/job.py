"""What a training run is told: the sections of a job file that the trainer reads."""

from dataclasses import dataclass, field
from typing import Literal

from gradcache import OBJECTIVES
from trainer.encoder.model import ModelSettings
from trainer.errors import InputError
from trainer.handoff.settings import DataSettings, NegativesSettings, RunSettings


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """Section `batch`."""

    queries: int = 128  # queries of one step over all ranks


@dataclass(frozen=True, kw_only=True)
class ChunkSettings:
    """Section `chunk`: memory of a step."""

    tokens: int = 8192  # padded tokens encoded at once on a rank; memory follows this and not the batch
    keep_graphs: int | Literal["all"] = 0  # chunks that need no second forward: more memory, less time


Backend = Literal["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Section `parallel`: how several ranks share one model."""

    backend: Backend = "ddp"
    reduce: Literal["step", "chunk"] = "step"  # chunk: fsdp2, zero2 and zero3 keep shards of gradients, for more traffic
    offload: bool = False  # zero1 to zero3: the optimizer, and with zero3 the parameters, in the host's memory

    def __post_init__(self) -> None:
        if self.reduce == "chunk" and self.backend not in ("fsdp2", "zero2", "zero3"):
            raise InputError(
                f'parallel.reduce="chunk" saves nothing with parallel.backend="{self.backend}", which keeps whole gradients; '
                'set parallel.reduce="step", or parallel.backend to fsdp2, zero2 or zero3'
            )
        if self.offload and self.backend not in ("zero1", "zero2", "zero3"):
            raise InputError(f'parallel.offload=true needs parallel.backend zero1, zero2 or zero3, found "{self.backend}"')


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Section `loss`."""

    objective: str = "info_nce"  # a name in gradcache.OBJECTIVES
    symmetric: bool = False  # also passage -> query, mean of both directions
    temperature: float = 0.05  # divides the scores
    learn_temperature: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Section `optim`: AdamW, linear warm-up, linear decay to zero."""

    lr: float = 2e-5
    temperature_lr: float = 1e-2  # of the logarithm of 1 / temperature, when it is learnt
    weight_decay: float = 0.01  # not on biases and norms
    max_grad_norm: float = 1.0
    warmup_share: float = 0.1  # of all steps
    epochs: float = 1.0  # passes over the training queries; unused when steps is set
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Section `checkpoint`."""

    every_steps: int = 200  # also after the last step
    keep: int = 3  # newest ones kept; pinned ones stay


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Section `eval`: before the first step and after the last one, with the corpus sharded over the ranks."""

    split: str = "test"  # qrels/NAME.tsv; an absent one is said and skipped


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that the trainer is told."""

    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    chunk: ChunkSettings = field(default_factory=ChunkSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    negatives: NegativesSettings = field(default_factory=NegativesSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)

    def __post_init__(self) -> None:
        positive = {
            "batch.queries": self.batch.queries,
            "chunk.tokens": self.chunk.tokens,
            "loss.temperature": self.loss.temperature,
            "optim.lr": self.optim.lr,
            "optim.max_grad_norm": self.optim.max_grad_norm,
            "optim.epochs": self.optim.epochs,
            "optim.steps": 1 if self.optim.steps is None else self.optim.steps,
            "checkpoint.every_steps": self.checkpoint.every_steps,
            "checkpoint.keep": self.checkpoint.keep,
        }
        for name, value in positive.items():
            if not value > 0:
                raise InputError(f"{name}={value} must be more than 0")
        if isinstance(self.chunk.keep_graphs, int) and self.chunk.keep_graphs < 0:
            raise InputError(f'chunk.keep_graphs={self.chunk.keep_graphs} must be 0 or more, or "all"')
        if self.loss.objective not in OBJECTIVES:
            raise InputError(f"loss.objective={self.loss.objective!r} is unknown; expected one of {', '.join(OBJECTIVES)}")
        if self.run.seed < 0:
            raise InputError(f"run.seed={self.run.seed} must be 0 or more")
        self._check_schedule()

    def _check_schedule(self) -> None:
        for entry in self.negatives.schedule:
            if entry.checkpoint % self.checkpoint.every_steps:
                raise InputError(
                    f"negatives.schedule names checkpoint {entry.checkpoint}, which is never written; "
                    f"choose multiples of checkpoint.every_steps={self.checkpoint.every_steps}"
                )
