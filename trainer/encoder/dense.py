"""A linear layer after the pooling, in the form of sentence-transformers' `Dense`, written and read here."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from trainer.encoder.source import cannot_load, find_file, read_json
from trainer.errors import InputError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# How sentence-transformers names what it applies behind the layer -> what it is
ACTIVATIONS: dict[str, type[nn.Module]] = {
    f"torch.nn.modules.{place}": kind
    for place, kind in {
        "linear.Identity": nn.Identity,
        "activation.Tanh": nn.Tanh,
        "activation.ReLU": nn.ReLU,
        "activation.GELU": nn.GELU,
        "activation.SiLU": nn.SiLU,
        "activation.Sigmoid": nn.Sigmoid,
    }.items()
}


class Dense(nn.Module):
    """activation(linear(embedding))."""

    def __init__(self, in_width: int, out_width: int, *, bias: bool = False, activation: type[nn.Module] = nn.Identity):
        super().__init__()
        self.linear = nn.Linear(in_width, out_width, bias=bias)
        self.activation = activation()

    def forward(self, embedding_nD: Tensor) -> Tensor:
        """Return the (n, out_width) embeddings."""
        return self.activation(self.linear(embedding_nD))

    @property
    def out_width(self) -> int:
        return self.linear.out_features


def save_dense(folder: Path, dense: Dense, weights: Mapping[str, Tensor]) -> None:
    """Write a layer with the given weights, under the names of its `state_dict`."""
    names = {kind: name for name, kind in ACTIVATIONS.items()}
    config = {
        "in_features": dense.linear.in_features,
        "out_features": dense.out_width,
        "bias": dense.linear.bias is not None,
        "activation_function": names[type(dense.activation)],
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    safetensors.torch.save_file(dict(weights), folder / WEIGHTS)


def read_dense(source: str, folder: str) -> Dense:
    """Return the layer in a folder of a model, from us or from sentence-transformers; raises InputError."""
    config = read_json(source, f"{folder}/{CONFIG}")
    weights = find_file(source, f"{folder}/{WEIGHTS}")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if weights is None:
        raise InputError(
            f"{source}/{folder} has no {WEIGHTS}, and other files are not opened, for they may run code; "
            "save the model anew with sentence-transformers 2.3 or later, or set model.name to another"
        )
    if activation not in ACTIVATIONS or config.get("use_residual"):
        raise InputError(
            f"{source}/{folder} is a Dense layer with {'a residual' if config.get('use_residual') else activation}, "
            f"expected one of {', '.join(name.rpartition('.')[2] for name in ACTIVATIONS)}; set model.name to another model"
        )
    try:
        widths = config["in_features"], config["out_features"]
        dense = Dense(*widths, bias=config.get("bias", True), activation=ACTIVATIONS[activation])
        dense.load_state_dict(safetensors.torch.load_file(weights))
    except Exception as error:
        raise cannot_load(source, error, folder) from error
    return dense
