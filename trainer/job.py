"""What a training run is told: the sections of a job file that the trainer reads."""

import re
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Interval
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.deepspeed_file import read_deepspeed
from trainer.early_stop import StopSettings
from trainer.encoder.settings import ModelSettings
from trainer.errors import InputError
from trainer.handoff.settings import (
    DataSettings,
    Mode,
    NegativesSettings,
    RunSettings,
    Sources,
    SourceSettings,
)
from trainer.loss_settings import LossSettings
from trainer.ranges import Precision, Share, job_section

if TYPE_CHECKING:
    from gradcache import Objective

# Of a source's settings, those that say nothing in a mode.
IDLE_IN_MODE: dict[Mode, tuple[str, ...]] = {
    "mixed": ("batch", "temperature", "objective", "parameters", "loss_weight"),
    "homogeneous": (),
    "tasks": ("weight",),
}


@job_section
class BatchSettings:
    """Section `batch`: which queries make a step."""

    queries: PositiveInt = 128
    """Queries of one step over all ranks."""
    mode: Mode = "mixed"
    """Of several sources: queries of all in a batch, one source for each batch, or a batch of every source in each step."""
    avoid_duplicates: bool = False
    """Keep equal queries, and those that share a positive, out of each other's batch."""
    clusters: Literal["mined"] | Path | None = None
    """Make batches of whole clusters of training queries: "mined" ones, that the miner publishes and each epoch takes over, or
    those of an .npz file. None: random batches.
    """

    def __post_init__(self) -> None:
        if isinstance(self.clusters, Path) and not self.clusters.is_file():
            raise InputError(f'batch.clusters={str(self.clusters)!r} is no file; expected "mined" or an .npz file of clusters')


@job_section
class ChunkSettings:
    """Section `chunk`: how much of a step is encoded at once, which decides its memory."""

    tokens: PositiveInt | Literal["auto"] = "auto"
    """Padded tokens encoded at once on a rank; memory follows this, not the batch."""
    keep_graphs: NonNegativeInt | Literal["all", "auto"] = "auto"
    """Chunks that need no second forward: more memory, less time."""
    memory_gib: PositiveFloat | None = None
    """GiB of a rank, for what is "auto"; None: the GPU's free memory; a CPU: 4096 tokens, 0 graphs."""


Backend = Literal["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]


@job_section
class ParallelSettings:
    """Section `parallel`: how several ranks share one model."""

    backend: Backend = "ddp"
    """What keeps the ranks' weights alike, and shards them: DDP, FSDP2, or a stage of DeepSpeed's ZeRO."""
    reduce: Literal["step", "chunk"] = "step"
    """With "chunk" fsdp2, zero2 and zero3 keep shards of gradients, for more traffic."""
    reshard_after_forward: bool = True
    """With fsdp2: free a layer's weights behind each forward, and gather them three times a chunk. false: layers stay whole from
    a step's first forward to its last backward, gathered once, for the memory of a copy in what precision.encode says."""
    shard_group: Literal["all", "node"] = "all"
    """With fsdp2: the ranks that hold one copy between them; those of a node take more memory, and less traffic between nodes."""
    deepspeed: Path | None = None
    """With zero0 to zero3: a JSON file of DeepSpeed's own settings; launch/deepspeed/ has some."""
    offload: bool = False
    """With zero1 to zero3: the optimizer, and with zero3 the parameters, in the host's memory."""
    timeout_s: PositiveFloat = 600.0
    """Seconds that ranks wait for one that gives no sign of life; then they end, to be started again."""

    def __post_init__(self) -> None:
        if self.reduce == "chunk" and self.backend not in ("fsdp2", "zero2", "zero3"):
            raise InputError(
                f'parallel.reduce="chunk" saves nothing with parallel.backend="{self.backend}", which keeps whole gradients; '
                'set parallel.reduce="step", or parallel.backend to fsdp2, zero2 or zero3'
            )
        if not self.reshard_after_forward and self.backend != "fsdp2":
            raise InputError(f'parallel.reshard_after_forward=false needs parallel.backend="fsdp2", found "{self.backend}"')
        if self.shard_group == "node" and self.backend != "fsdp2":
            raise InputError(f'parallel.shard_group="node" needs parallel.backend="fsdp2", found "{self.backend}"')
        if self.deepspeed is not None and not self.backend.startswith("zero"):
            raise InputError(f'parallel.deepspeed is for parallel.backend zero0 to zero3, found "{self.backend}"')
        if self.deepspeed is not None:
            read_deepspeed(self.deepspeed, int(self.backend.removeprefix("zero")))
        if self.offload and self.backend not in ("zero1", "zero2", "zero3"):
            raise InputError(f'parallel.offload=true needs parallel.backend zero1, zero2 or zero3, found "{self.backend}"')


@job_section
class PrecisionSettings:
    """Section `precision`: what encoder and products compute in. Weights, gradients, the loss and its sums are always float32."""

    encode: Precision | Literal["auto"] = "auto"
    """Autocast of the encoder; fp16 comes with a loss scaler. auto: bf16 on GPUs that have it, else fp32."""
    products: Literal["fp32", "bf16", "auto"] = "auto"
    """What embeddings are gathered and multiplied in: bf16 halves traffic. auto: bf16 where a GPU encodes in half precision."""
    tf32: bool = False
    """Float32 products of a GPU in TensorFloat-32: faster, 10 bits of mantissa."""


@job_section
class OptimSettings:
    """Section `optim`: AdamW, with a linear warm-up."""

    lr: PositiveFloat = 2e-5
    """Learning rate at its highest."""
    temperature_lr: NonNegativeFloat = 1e-2
    """Learning rate of what the loss learns: the logarithm of 1 / temperature, and numbers of an objective."""
    weight_decay: NonNegativeFloat = 0.01
    """Not on biases and norms."""
    max_grad_norm: PositiveFloat = 1.0
    """Norm that the encoder's gradient is clipped to; the temperature's is clipped by itself."""
    max_skipped: PositiveInt = 10
    """Updates in a row left out, because gradients are not finite, before the run ends with code 78."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """What follows the warm-up, as transformers has it."""
    warmup_share: Share = 0.1
    """Share of all steps."""
    epochs: PositiveFloat = 1.0
    """Passes over the training queries; unused when steps is set."""
    steps: PositiveInt | None = None
    """Steps of the whole run; None: what epochs says."""


@job_section
class EmaSettings:
    """Section `ema`: a moving average of the weights; evaluated and published in their place."""

    decay: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """Share of the average that stays with each step, as 0.999; None: no average."""


@job_section
class CheckpointSettings:
    """Section `checkpoint`: when the run is saved, and what stays."""

    every_steps: PositiveInt = 200
    """Steps between two checkpoints; there is one after the last step, too."""
    keep: PositiveInt = 3
    """Newest ones kept; pinned ones stay, and the best one on dev, which is saved at the evaluation that finds it."""
    keep_every_steps: PositiveInt | None = None
    """Of the multiples of this number all are kept."""


@job_section
class EvalSettings:
    """Section `eval`: which queries the model is evaluated on, and when; the corpus is sharded over the ranks."""

    split: str = "test"
    """Split before the first step and after the last, qrels/NAME.tsv; an absent one is said and skipped."""
    dev_split: str = "dev"
    """Split in between, and what section stop decides by."""
    every_steps: PositiveInt | None = None
    """Steps between two evaluations on dev_split; then there is one before the first step and after the last, too. None: none."""


@job_section
class ProfileSettings:
    """Section `profile`: steps to look at closely."""

    steps: str | None = None
    """FIRST:LAST, "10:13" for steps 10, 11 and 12: their trace goes to logs/, for https://ui.perfetto.dev. None: no trace."""

    def __post_init__(self) -> None:
        if self.steps is not None and not len(self.numbers):
            raise InputError(f'profile.steps="{self.steps}" names no steps; expected "10:13" for the steps 10, 11 and 12')

    @property
    def numbers(self) -> range:
        """The steps, as the log counts them: the first is 1."""
        found = re.fullmatch(r"(\d+):(\d+)", self.steps or "")
        return range(0) if found is None or found[1] == "0" else range(int(found[1]), int(found[2]))


@job_section
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
    profile: ProfileSettings = field(default_factory=ProfileSettings)

    def __post_init__(self) -> None:
        if self.precision.encode == "fp16" and self.parallel.backend != "ddp":
            raise InputError(
                f'precision.encode="fp16" needs a loss scaler, which parallel.backend="{self.parallel.backend}" has none for; '
                'set precision.encode="bf16" or parallel.backend="ddp"'
            )
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
        if not self.loss.is_plain:
            self._check_objective("loss", self.loss.build_objective())

    def _check_objective(self, where: str, objective: "Objective") -> None:
        if objective.wants_own_negatives and self.negatives.per_query == 0:
            raise InputError(
                f"{where}.objective with these parameters looks at the hard negatives that a query brings; set "
                "negatives.per_query to 1 or more"
            )

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
            if source.parameters and source.objective is None:
                raise InputError(f"sources.{name}.parameters belong to an objective of its own; set sources.{name}.objective")
            if source.objective is not None:
                self._check_objective(f"sources.{name}", self.loss.objective_of(name, source))
            for key in idle:
                value = getattr(source, key)
                if value != getattr(SourceSettings(path=source.path), key):
                    others = " or ".join(f'"{other}"' for other, keys in IDLE_IN_MODE.items() if key not in keys)
                    raise InputError(
                        f'sources.{name}.{key}={value!r} has no effect with batch.mode="{mode}"; '
                        f"set batch.mode to {others}, or take it away"
                    )
