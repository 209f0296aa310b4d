"""The numbers a step computes in: autocast of the encoder, a loss scaler for float16, TensorFloat-32 where it is asked for."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.encoder.encode import DTYPES
from trainer.job import PrecisionSettings


def set_tf32(settings: PrecisionSettings) -> None:
    """Allow or forbid TensorFloat-32 in this process."""
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32


def encode_in(module: nn.Module, settings: PrecisionSettings, device: torch.device) -> Callable[..., Tensor]:
    """Return what encodes a chunk: the module, under autocast if it is asked for."""
    if settings.encode == "fp32":
        return module

    def encode(*inputs, **options) -> Tensor:
        with torch.autocast(device.type, DTYPES[settings.encode]):
            return module(*inputs, **options)

    return encode


def loss_scaler(settings: PrecisionSettings, device: torch.device) -> torch.amp.GradScaler:
    """Return the scaler of float16 gradients, which would underflow; one that does nothing for other types."""
    return torch.amp.GradScaler(device.type, enabled=settings.encode == "fp16")


def product_dtype(settings: PrecisionSettings) -> torch.dtype:
    """Return what embeddings are gathered and multiplied in."""
    return DTYPES[settings.products]
