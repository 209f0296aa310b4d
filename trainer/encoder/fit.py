"""Batches without gradient that are halved where they do not fit into memory, as the trainer halves its chunks.

What fitted is remembered by the process, so that the next batch does not fail first. Halving changes the shapes that embeddings
are computed in, and so their last bits, as another process that computes them has it with other batches: a fingerprint names the
tokens of a batch that are aimed at, and the manifest of a shard those that it was made with, so no shard claims what it is not.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from gradcache.tight import free_what_failed, is_out_of_memory

log = logging.getLogger(__name__)

_fitting: dict[str, int] = {}  # tokens of a batch that fit, by device, where fewer fit than were asked for


def fitting_tokens(device: torch.device, asked: int) -> int:
    """Return the tokens of a batch that are known to fit, at most as many as are asked for."""
    return min(asked, _fitting.get(str(device), asked))


def halved_to() -> int | None:
    """Return the tokens of this process's batches where memory has halved them, on any device; else None."""
    return min(_fitting.values(), default=None)


def encode_fitting(encode: Callable[[Tensor], Tensor], lengths: Tensor, device: torch.device) -> Tensor:
    """Return the embeddings of a batch's rows, made in as many parts as fit.

    encode: row numbers within the batch (m,) -> (m, D). lengths: (n,) tokens of each row.
    Raises torch.OutOfMemoryError where one text does not fit.
    """
    waiting: list[Tensor] = [torch.arange(len(lengths))]
    done: list[Tensor] = []
    while waiting:
        rows = waiting.pop(0)
        num_tokens, may_halve = int(lengths[rows].sum()), len(rows) > 1
        if may_halve and num_tokens > fitting_tokens(device, num_tokens):
            waiting[:0] = rows.tensor_split(2)
        elif not fits(functools.partial(_append, done, encode, rows), may_halve):
            _remember(num_tokens, len(rows), device)
            waiting[:0] = rows.tensor_split(2)
    return done[0] if len(done) == 1 else torch.cat(done)


def fits(work: Callable[[], None], may_halve: bool) -> bool:
    """Do some work, and return whether it fitted into memory; raises the error where it did not and cannot be halved."""
    try:
        work()
    except RuntimeError as error:
        if not is_out_of_memory(error) or not may_halve:
            raise
    else:
        return True
    free_what_failed()  # outside of the handler, whose error refers to what it has to free
    return False


def _append(done: list[Tensor], encode: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    done.append(encode(rows))


def _remember(num_tokens: int, num_rows: int, device: torch.device) -> None:
    first = str(device) not in _fitting
    _fitting[str(device)] = max(1, num_tokens // 2)
    if first:
        log.warning(
            "out of memory: a batch of %d texts, %d tokens, does not fit on %s; from here on batches are halved",
            num_rows, num_tokens, device,
        )  # fmt: skip
