"""What a bench borrows of a job: a model as a job loads it, and how a job's steps encode its texts."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from launch.bench.shapes import model_of
from trainer.data.collate import RowEncoder
from trainer.encoder.encode import DTYPES
from trainer.encoder.model import Encoder, ModelSettings, load_encoder
from trainer.encoder.packed import packs
from trainer.job import PrecisionSettings
from trainer.precision import encode_in


def load(name: str, max_tokens: int) -> tuple[Encoder, PreTrainedTokenizerBase]:
    """Return a model and its tokenizer, for texts of so many tokens; name: also of a size (shapes.py)."""
    settings = ModelSettings(name=model_of(name), max_query_tokens=max_tokens, max_passage_tokens=max_tokens)
    encoder, tokenizer, _ = load_encoder(settings)
    return encoder, tokenizer


def encoded_by(encoder: Encoder, module: nn.Module, precision: str, device: torch.device, compiles: bool = False) -> RowEncoder:
    """Return what encodes a step's rows as a job does it: packed where the encoder takes that. module: it, under its backend.

    precision: fp32 or bf16. compiles: its layers by torch.compile, from the next call on, while it trains.
    """
    encode = encode_in(module, PrecisionSettings(encode=precision), device)  # type: ignore[arg-type]
    is_packed = packs(encoder, device, DTYPES[precision])
    if compiles:
        encoder.compile_layers(is_packed)
    return RowEncoder(encode, device, encoder.has_two_towers, is_packed)
