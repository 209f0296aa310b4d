"""The exact gradient: of the mean loss over the queries of all ranks, in one process, one graph and float64, without dropout.

Written to be obviously right, and to share nothing with those that are compared with it but the model and the texts.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from launch.bench.job_path import load
from launch.bench.pairs import Pairs
from launch.bench.peer import TEMPERATURE
from trainer.errors import InputError


class Compared(NamedTuple):
    """A gradient beside the exact one: 1 and 1 where it is that one."""

    ratio: float  # of the norms
    cosine: float


def write_exact(file: Path, model: str, max_tokens: int, pairs: Pairs) -> None:
    """Write the gradient of all pairs' loss."""
    encoder, _ = load(model, max_tokens)
    encoder.double().eval()
    rows = np.arange(len(pairs))
    query_QD, passage_QD = (encoder(table.pad(rows)).double() for table in pairs.tables)
    nn.functional.cross_entropy(query_QD @ passage_QD.T / TEMPERATURE, torch.arange(len(rows))).backward()
    save_file(named_gradients(encoder), file)


def compare(model: nn.Module, name: str, exact: Path) -> Compared:
    """Return a model's gradient beside the exact one; raises InputError where its parameters are not those of the exact one."""
    wanted, found = load_file(exact), named_gradients(model)
    if missing := sorted(wanted.keys() - found.keys()):
        raise InputError(
            f"{name} has no gradient of {missing[0]}; the peers compare models of one transformer without layers behind its "
            "pooling; set --model to such a one"
        )
    names = sorted(wanted)
    a, b = (torch.cat([side[each].flatten().double().cpu() for each in names]) for side in (found, wanted))
    return Compared(float(a.norm() / b.norm()), float(torch.cosine_similarity(a, b, 0)))


def named_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients under the names that the transformer itself gives to its parameters."""
    grads = ((bare_name(name), parameter.grad) for name, parameter in module.named_parameters())
    return {name: gradient for name, gradient in grads if gradient is not None}


def bare_name(name: str) -> str:
    """Return a parameter's name without those of the modules around the transformer."""
    return name.rsplit("model.", 1)[-1]
