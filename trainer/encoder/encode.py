"""Embeddings of many texts without gradient, in batches of one token budget after a length sort.

A thread reads the next batch's tokens while one is encoded, and a GPU always has the next batch queued when one ends: this
keeps a GPU busy; on a CPU it gains hardly anything.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from gradcache.chunks import plan_chunks
from gradcache.transfers import upload
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
    dtype: of the encoder's products (autocast). Embeddings of a GPU come to the host batch by batch.
    """
    embedding_nD: Tensor | None = None
    with ThreadPoolExecutor(1) as reader:
        batches = Batches(encoder, tokens, rows, dtype, reader)
        with batches.modes():
            for chunk, out_mD in _landed(batches.encoded()):
                if embedding_nD is None:
                    embedding_nD = torch.empty(len(rows), out_mD.shape[1])
                embedding_nD[chunk] = out_mD
                on_progress(len(chunk))
    assert embedding_nD is not None
    return embedding_nD.numpy()


def token_budget(device: torch.device) -> int:
    """Return the padded tokens of a batch on a device."""
    return ENCODE_TOKENS_CUDA if device.type == "cuda" else ENCODE_TOKENS


class Batches:
    """Some rows of a token table, cut into batches. The tokens of each are read while the one before it is encoded."""

    def __init__(self, encoder: Encoder, tokens: TokenTable, rows: np.ndarray, dtype: torch.dtype, reader: Executor):
        """Read the first batch, in the thread that calls.

        reader: a thread that reads the other batches; it may be the one that calls.
        """
        if len(rows) == 0:
            raise ValueError("there is nothing to encode: at least one row is needed")
        self.device = next(encoder.parameters()).device
        self.num_rows = len(rows)
        self._encoder, self._tokens, self._rows, self._dtype, self._reader = encoder, tokens, rows, dtype, reader
        self._lengths = torch.as_tensor(tokens.lengths[rows])
        self._is_packed = packs(encoder, self.device, dtype)
        self._chunks = plan_chunks(self._lengths, token_budget(self.device), self._is_packed)
        self._first = self._read(self._chunks[0])

    def embed(
        self, stored: torch.dtype, on_progress: Callable[[int], None] = lambda n: None, then: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Return the embeddings of all rows, (n, D), in their order and on the encoder's device; a GPU may still compute them.

        stored: their type. on_progress: called after each batch with the number of rows it held.
        then: called once, before the last batch is encoded.
        """
        embedding_nD: Tensor | None = None
        before = None
        with self.modes():
            for chunk, out_mD in self.encoded(then):
                if embedding_nD is None:
                    with torch.inference_mode(False):  # whoever sees them may be in any mode
                        embedding_nD = torch.empty(self.num_rows, out_mD.shape[1], dtype=stored, device=self.device)
                embedding_nD.index_copy_(0, upload(chunk, self.device), out_mD.to(stored))
                before = _wait_for_the_one_before(before, self.device)
                on_progress(len(chunk))
        assert embedding_nD is not None
        return embedding_nD

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        """Have the encoder evaluate, without gradient and in its type, during the block."""
        was_training, dtype = self._encoder.training, self._dtype
        self._encoder.eval()
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                yield
        finally:
            self._encoder.train(was_training)

    def encoded(self, then: Callable[[], None] = lambda: None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (places among the rows, embeddings) of every batch; to be used up within `modes`, once."""
        loaded = self._first
        del self._first  # a batch's tokens are in memory only as long as they are needed
        for number, chunk in enumerate(self._chunks):
            ahead = None
            if number + 1 < len(self._chunks):
                ahead = self._reader.submit(self._read, self._chunks[number + 1])
            else:
                then()
            yield chunk, self._encode(chunk, loaded)
            if ahead is not None:
                loaded = ahead.result()

    def _encode(self, chunk: Tensor, loaded: StepTokens) -> Tensor:
        return encode_fitting(lambda rows: self._encoder(loaded.load(rows)).float(), self._lengths[chunk], self.device)

    def _read(self, chunk: Tensor) -> StepTokens:
        return StepTokens([(self._tokens, self._rows[chunk.numpy()])], self.device, self._is_packed)


class ToHost:
    """A tensor on its way to the host."""

    def __init__(self, values: Tensor):
        """values: must not change until they are there; of a GPU they are copied when it comes to that."""
        self._event = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self._event = _record(values.device)

    def wait(self) -> Tensor:
        """Return the values once they are there; from any thread."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


def _landed(encoded: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (places, embeddings on the host) of every batch, those of a GPU when the batch behind it has been queued."""
    coming: list[tuple[Tensor, ToHost]] = []
    for chunk, out_mD in encoded:
        coming.append((chunk, ToHost(out_mD)))
        if len(coming) > 1 or out_mD.device.type != "cuda":
            chunk, landing = coming.pop(0)
            yield chunk, landing.wait()
    for chunk, landing in coming:
        yield chunk, landing.wait()


def _wait_for_the_one_before(before: torch.cuda.Event | None, device: torch.device) -> torch.cuda.Event | None:
    """Wait until a GPU has ended the batch before the last one, so that the host is one batch ahead; return the last one's."""
    if device.type != "cuda":
        return None
    if before is not None:
        before.synchronize()
    return _record(device)


def _record(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event
