"""What "auto" stands for in the settings of precision: half precision on a GPU that multiplies bfloat16, float32 elsewhere.

bfloat16 has the range of float32, so nothing has to be scaled. float16 is nobody's "auto" for an encoder: its gradients need a
scaler, which only one backend has. So a GPU without bfloat16, one of before Ampere, computes in float32.
"""

from dataclasses import replace

import torch

from trainer.encoder.settings import EncodeSettings
from trainer.ranges import AUTO

BF16_SINCE = (8, 0)  # compute capability; older GPUs imitate bfloat16, slower than float32


def takes_bf16(device: torch.device) -> bool:
    """Tell whether a device is a GPU that multiplies bfloat16."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= BF16_SINCE


def encode_on(settings: EncodeSettings, device: torch.device) -> EncodeSettings:
    """Return the settings with what "auto" stands for on a device.

    On disk a GPU's half precision is float16, which has three more bits of mantissa than bfloat16 and room for any embedding.
    """
    return encode_for(settings, takes_bf16(device), device.type == "cuda")


def encode_for(settings: EncodeSettings, has_bf16: bool, on_gpu: bool) -> EncodeSettings:
    """Return the same for a device that need not be here."""
    dtype = settings.dtype
    if dtype == AUTO:
        dtype = "bf16" if has_bf16 else "fp32"
    stored = settings.stored
    if stored == AUTO:
        stored = "fp16" if on_gpu and dtype != "fp32" else "fp32"
    return replace(settings, dtype=dtype, stored=stored)


def device_in_words(device: torch.device) -> str:
    """Return what a person calls a device, with what it lacks."""
    if device.type != "cuda":
        return "the CPU"
    name = torch.cuda.get_device_name(device)
    return name if takes_bf16(device) else f"{name}, which has no bfloat16"
