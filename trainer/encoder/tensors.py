"""Weights in files of others: safetensors, or a pickle that torch proves to hold nothing but tensors."""

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from trainer.encoder.source import cannot_load
from trainer.errors import InputError

NO_PICKLE = (
    "holds more than tensors, and reading it could run code, which negpool never does; if you trust it, convert it with "
    "safetensors.torch.save_file(torch.load('{name}', weights_only=False), '{safe}')"
)


def read_tensors(folder: Path, name: str, old_name: str) -> dict[str, Tensor]:
    """Return what `name`, of safetensors, holds, or where it is absent the pickle `old_name`; raises InputError."""
    path, pickle = folder / name, folder / old_name
    try:
        if path.is_file():
            return safetensors.torch.load_file(path)
        if pickle.is_file():
            return torch.load(pickle, map_location="cpu", weights_only=True)
    except Exception as error:
        raise refused_pickle(folder, error) or cannot_load(str(folder), error, name) from error
    raise InputError(f"{folder} has neither {name} nor {old_name}; put the weights there, or set model.name to a whole model")


def refused_pickle(folder: Path, error: BaseException) -> InputError | None:
    """Return the sentence for a pickle that torch does not read as tensors alone; None for any other error."""
    if "weights only load failed" not in str(error).lower() and "weights_only" not in str(error):
        return None
    names = sorted(path.name for path in folder.glob("*.bin")) or ["pytorch_model.bin"]
    safe = names[0].replace("pytorch_model", "model").replace(".bin", ".safetensors")
    return InputError(f"{folder / names[0]} {NO_PICKLE.format(name=names[0], safe=safe)}")


def write_json(path: Path, value) -> None:
    """Write a value as a file that people read, too."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
