"""Embeddings of many texts without gradient, in batches of one token budget after a length sort."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from gradcache.chunks import plan_chunks
from trainer.encoder.tokens import TokenTable

# Padded tokens in one forward: large enough for full speed on a CPU core or a GPU, small enough for any memory.
# A constant, because the last bits of an embedding depend on the shapes it was computed in.
ENCODE_TOKENS = 4096
ENCODE_TOKENS_CUDA = 131072


def encode_rows(
    encoder: nn.Module, tokens: TokenTable, rows: np.ndarray, on_progress: Callable[[int], None] = lambda n: None
) -> np.ndarray:
    """Return the (len(rows), D) float32 embeddings of the given rows of a token table, in their order.

    on_progress: called after each batch with the number of rows it held.
    """
    if len(rows) == 0:
        raise ValueError("encode_rows needs at least one row")
    device = next(encoder.parameters()).device
    lengths = torch.as_tensor(tokens.lengths[rows])
    budget = ENCODE_TOKENS_CUDA if device.type == "cuda" else ENCODE_TOKENS
    embedding_nD: Tensor | None = None
    was_training = encoder.training
    encoder.eval()
    with torch.inference_mode():
        for chunk in plan_chunks(lengths, budget):
            inputs = {name: tensor.to(device) for name, tensor in tokens.pad(rows[chunk.numpy()]).items()}
            out = encoder(inputs).float().cpu()
            if embedding_nD is None:
                embedding_nD = torch.empty(len(rows), out.shape[1])
            embedding_nD[chunk] = out
            on_progress(len(chunk))
    encoder.train(was_training)
    assert embedding_nD is not None
    return embedding_nD.numpy()
