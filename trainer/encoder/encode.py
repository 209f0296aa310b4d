"""Embeddings of many texts without gradient, in batches of one token budget after a length sort.

A thread reads and pads the next batch and brings it to the device while one is encoded: this keeps a GPU busy; on a CPU it
gains hardly anything.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from gradcache.chunks import plan_chunks
from trainer.encoder.tokens import TokenTable

# Padded tokens in one forward: large enough for full speed on a CPU core or a GPU, small enough for any memory.
# A constant, because the last bits of an embedding depend on the shapes it was computed in.
ENCODE_TOKENS = 4096
ENCODE_TOKENS_CUDA = 131072
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names of trainer/ranges.py


def encode_rows(
    encoder: nn.Module,
    tokens: TokenTable,
    rows: np.ndarray,
    on_progress: Callable[[int], None] = lambda n: None,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Return the (len(rows), D) float32 embeddings of the given rows of a token table, in their order.

    on_progress: called after each batch with the number of rows it held.
    dtype: of the encoder's products (autocast).
    """
    if len(rows) == 0:
        raise ValueError("encode_rows needs at least one row")
    device = next(encoder.parameters()).device
    embedding_nD: Tensor | None = None
    was_training = encoder.training
    encoder.eval()
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for chunk, inputs in _batches(tokens, rows, device):
            out = encoder(inputs).float().cpu()
            if embedding_nD is None:
                embedding_nD = torch.empty(len(rows), out.shape[1])
            embedding_nD[chunk] = out
            on_progress(len(chunk))
    encoder.train(was_training)
    assert embedding_nD is not None
    return embedding_nD.numpy()


def token_budget(device: torch.device) -> int:
    """Return the padded tokens of a batch on a device."""
    return ENCODE_TOKENS_CUDA if device.type == "cuda" else ENCODE_TOKENS


def _batches(tokens: TokenTable, rows: np.ndarray, device: torch.device) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield (places in rows, inputs on the device) of every batch, one batch ahead."""
    chunks = plan_chunks(torch.as_tensor(tokens.lengths[rows]), token_budget(device))

    def load(chunk: Tensor) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in tokens.pad(rows[chunk.numpy()]).items()}

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(load, chunks[0])
        for number, chunk in enumerate(chunks):
            inputs = ahead.result()
            if number + 1 < len(chunks):
                ahead = reader.submit(load, chunks[number + 1])
            yield chunk, inputs
