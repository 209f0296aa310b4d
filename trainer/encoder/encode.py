"""Embeddings of many texts without gradient, in batches of one token budget after a length sort.

A thread reads the next batch's tokens while one is encoded, and embeddings of a GPU come back while the next batch is already
queued there: this keeps a GPU busy; on a CPU it gains hardly anything.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from gradcache.chunks import plan_chunks
from trainer.encoder.fit import encode_fitting
from trainer.encoder.packed import packs
from trainer.encoder.step_tokens import StepTokens
from trainer.encoder.tokens import TokenTable
from trainer.encoder.towers import Encoder

# Padded tokens in one forward: large enough for full speed on a CPU core or a GPU, small enough for any memory.
# A constant, because the last bits of an embedding depend on the shapes it was computed in.
ENCODE_TOKENS = 4096
ENCODE_TOKENS_CUDA = 131072
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names of trainer/ranges.py


def encode_rows(
    encoder: Encoder,
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
    lengths = torch.as_tensor(tokens.lengths[rows])
    was_training = encoder.training
    encoder.eval()
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        batches = _batches(tokens, rows, device, packs(encoder, device, dtype))
        encoded = ((chunk, _encode(encoder, loaded, lengths[chunk], device)) for chunk, loaded in batches)
        for chunk, out_mD in _landed(encoded):
            if embedding_nD is None:
                embedding_nD = torch.empty(len(rows), out_mD.shape[1])
            embedding_nD[chunk] = out_mD
            on_progress(len(chunk))
    encoder.train(was_training)
    assert embedding_nD is not None
    return embedding_nD.numpy()


def _encode(encoder: Encoder, loaded: StepTokens, lengths: Tensor, device: torch.device) -> Tensor:
    return encode_fitting(lambda rows: encoder(loaded.load(rows)).float(), lengths, device)


def token_budget(device: torch.device) -> int:
    """Return the padded tokens of a batch on a device."""
    return ENCODE_TOKENS_CUDA if device.type == "cuda" else ENCODE_TOKENS


def _batches(tokens: TokenTable, rows: np.ndarray, device: torch.device, is_packed: bool) -> Iterator[tuple[Tensor, StepTokens]]:
    """Yield (places in rows, their tokens) of every batch; the next one is read meanwhile."""
    chunks = plan_chunks(torch.as_tensor(tokens.lengths[rows]), token_budget(device), is_packed)

    def read(chunk: Tensor) -> StepTokens:
        return StepTokens([(tokens, rows[chunk.numpy()])], device, is_packed)

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, chunks[0])
        for number, chunk in enumerate(chunks):
            loaded = ahead.result()
            if number + 1 < len(chunks):
                ahead = reader.submit(read, chunks[number + 1])
            yield chunk, loaded


def _landed(encoded: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (places, embeddings on the host) of every batch, those of a GPU when the batch behind it has been queued."""
    coming: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []
    for chunk, out_mD in encoded:
        if out_mD.device.type != "cuda":
            yield chunk, out_mD.cpu()
            continue
        host_mD = torch.empty(out_mD.shape, dtype=out_mD.dtype, pin_memory=True).copy_(out_mD, non_blocking=True)
        coming.append((chunk, host_mD, torch.cuda.Event(blocking=True)))
        coming[-1][2].record(torch.cuda.current_stream(out_mD.device))
        if len(coming) > 1:
            yield _when_there(*coming.pop(0))
    for late in coming:
        yield _when_there(*late)


def _when_there(chunk: Tensor, host_mD: Tensor, event: torch.cuda.Event) -> tuple[Tensor, Tensor]:
    event.synchronize()
    return chunk, host_mD
