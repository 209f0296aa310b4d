"""The numbers a step computes in: autocast of the encoder, a loss scaler for float16, TensorFloat-32 where it is asked for."""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from trainer.encoder.auto import device_in_words, takes_bf16
from trainer.encoder.encode import DTYPES
from trainer.handoff.weights import Checkpoint
from trainer.job import PrecisionSettings, TrainJob
from trainer.ranges import AUTO
from trainer.world import World

log = logging.getLogger(__name__)


def settle_precision(job: TrainJob, world: World) -> TrainJob:
    """Return the job with what "auto" stands for in section precision, and say so. Collective."""
    precision = settled_precision(job.precision, world)
    if precision != job.precision:
        told = precision.encode, precision.products, device_in_words(world.device)
        log.info("precision.encode=%s and precision.products=%s on %s", *told)
    return replace(job, precision=precision)


def settled_precision(settings: PrecisionSettings, world: World) -> PrecisionSettings:
    """Return the settings with what "auto" stands for, the same on all ranks: half where the GPU of each has it. Collective."""
    return precision_on(settings, not world.all_max([int(not takes_bf16(world.device))])[0])


def precision_on(settings: PrecisionSettings, has_bf16: bool) -> PrecisionSettings:
    """Return the settings with what "auto" stands for; has_bf16: on GPUs that multiply bfloat16.

    Products follow the encoder: whoever asks for float32 there wants its digits.
    """
    encode = settings.encode
    if encode == AUTO:
        encode = "bf16" if has_bf16 else "fp32"
    products = settings.products
    if products == AUTO:
        products = "bf16" if has_bf16 and encode != "fp32" else "fp32"
    return replace(settings, encode=encode, products=products)


def computed_in(settings: PrecisionSettings) -> dict[str, str]:
    """Return what a checkpoint keeps of the precision that it was trained in."""
    return {"encode": settings.encode, "products": settings.products}


def tell_other_precision(checkpoint: Checkpoint, settings: PrecisionSettings) -> None:
    """Log it where a run goes on in another precision, as on another kind of device: weights and moments are float32 in all."""
    now = computed_in(settings)
    before = checkpoint.manifest.get("precision", now)  # of before this was kept: not known
    told = [f"precision.{name} was {before[name]} and is {now[name]}" for name in now if before[name] != now[name]]
    if told:
        log.info("from step %d on %s", checkpoint.step, ", ".join(told))


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
