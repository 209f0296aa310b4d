"""The encoder's own work: a forward over batches that were made in advance, with nothing around it."""

from typing import Any

import torch

from gradcache.chunks import plan_chunks
from trainer.encoder.encode import token_budget
from trainer.encoder.packed import packs
from trainer.encoder.step_tokens import StepTokens
from trainer.encoder.tokens import TokenTable
from trainer.encoder.towers import Encoder


def batches_of(tokens: TokenTable, encoder: Encoder, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return the batches that we would make of a table, on the encoder's device."""
    device = next(encoder.parameters()).device
    is_packed = packs(encoder, device, dtype)
    chunks = plan_chunks(torch.tensor(tokens.lengths), token_budget(device), is_packed)
    made = (StepTokens([(tokens, chunk.numpy())], device, is_packed) for chunk in chunks)
    return [loaded.load(torch.arange(len(chunk))) for chunk, loaded in zip(chunks, made, strict=True)]


def forward(encoder: Encoder, batches: list[dict[str, Any]], dtype: torch.dtype) -> None:
    device = next(encoder.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch in batches:
            encoder(batch)
