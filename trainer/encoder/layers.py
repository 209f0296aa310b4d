"""Layers behind the pooling, applied in their order, in the form of sentence-transformers' modules: written and read here.

Each says in `config` what, beside its weights, decides what it computes, under sentence-transformers' names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from trainer.encoder.dropout import Dropout as FastDropout
from trainer.encoder.source import cannot_load, read_json
from trainer.encoder.tensors import read_tensors, write_json
from trainer.errors import InputError

CONFIG, WEIGHTS, OLD_WEIGHTS = "config.json", "model.safetensors", "pytorch_model.bin"
IDENTITY, TANH = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh"
EMBEDDING = "sentence_embedding"
NAMES = {"module_input_name": EMBEDDING, "module_output_name": EMBEDDING}  # what a layer reads and writes


class Dense(nn.Module):
    """activation(linear(embedding)), plus a residual where it is asked for."""

    def __init__(self, in_width: int, out_width: int, *, bias: bool = False, activation: str = IDENTITY, residual: bool = False):
        super().__init__()
        self.linear = nn.Linear(in_width, out_width, bias=bias)
        self.activation_function = _activation(activation)
        self.has_residual = residual
        if residual and in_width != out_width:
            self.residual = nn.Linear(in_width, out_width, bias=False)

    def forward(self, embedding_nD: Tensor) -> Tensor:
        """Return the (n, out_width) embeddings."""
        out_nD = self.activation_function(self.linear(embedding_nD))
        if not self.has_residual:
            return out_nD
        return out_nD + (self.residual(embedding_nD) if hasattr(self, "residual") else embedding_nD)

    @property
    def out_width(self) -> int:
        return self.linear.out_features

    def config(self) -> dict[str, Any]:
        """Return what sentence-transformers' `Dense` is made of."""
        kind = type(self.activation_function)
        config = {
            "in_features": self.linear.in_features,
            "out_features": self.out_width,
            "bias": self.linear.bias is not None,
            "activation_function": f"{kind.__module__}.{kind.__name__}",
        }
        return config | ({"use_residual": True} if self.has_residual else {})

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Dense":
        """Return a layer of this configuration, its weights still to come."""
        return cls(
            config["in_features"],
            config["out_features"],
            bias=config.get("bias", True),
            activation=config.get("activation_function", TANH),
            residual=config.get("use_residual", False),
        )


class LayerNorm(nn.Module):
    """An embedding of mean 0 and deviation 1, times weights, plus a bias."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, embedding_nD: Tensor) -> Tensor:
        """Return the (n, D) embeddings."""
        return self.norm(embedding_nD)

    def config(self) -> dict[str, Any]:
        """Return what sentence-transformers' `LayerNorm` is made of."""
        return {"dimension": self.norm.normalized_shape[0]}

    @classmethod
    def of(cls, config: dict[str, Any]) -> "LayerNorm":
        """Return a layer of this configuration, its weights still to come."""
        return cls(config["dimension"])


class Normalize(nn.Module):
    """Unit length in the middle of the layers; at their end it is `Traits.normalize`."""

    def forward(self, embedding_nD: Tensor) -> Tensor:
        """Return the (n, D) embeddings."""
        return nn.functional.normalize(embedding_nD, dim=-1)

    def config(self) -> dict[str, Any]:
        """Return nothing: there is one way to do it."""
        return {}

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Normalize":
        """Return the layer."""
        return cls()


class Dropout(FastDropout):
    """Dropout of the embedding, in training."""

    def config(self) -> dict[str, Any]:
        """Return what sentence-transformers' `Dropout` is made of."""
        return {"dropout": self.p}

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Dropout":
        """Return a layer of this configuration."""
        return cls(config.get("dropout", 0.2))


Layer = Dense | LayerNorm | Normalize | Dropout
# sentence-transformers' name of a module -> the layer, and the keys of its configuration
LAYERS: dict[str, tuple[type[Layer], set[str]]] = {
    "Dense": (Dense, {"in_features", "out_features", "bias", "activation_function", "use_residual"}),
    "LayerNorm": (LayerNorm, {"dimension"}),
    "Normalize": (Normalize, set()),
    "Dropout": (Dropout, {"dropout"}),
}


def width_behind(layers: nn.ModuleList | list[Layer], width: int) -> int:
    """Return the width of an embedding that goes into the layers with the given one."""
    for layer in layers:
        width = getattr(layer, "out_width", width)
    return int(width)


def save_layer(folder: Path, layer: Layer, weights: Mapping[str, Tensor]) -> None:
    """Write a layer with the given weights, under the names of its `state_dict`."""
    write_json(folder / CONFIG, layer.config())
    if weights:
        safetensors.torch.save_file(dict(weights), folder / WEIGHTS)


def read_layer(source: str, kind: str, path: str) -> Layer:
    """Return the layer in a folder of a model, from us or from sentence-transformers; raises InputError."""
    config, (layer_kind, keys) = read_json(source, f"{path}/{CONFIG}"), LAYERS[kind]
    place = f"{source}/{path}"
    for name, expected in NAMES.items():
        if config.get(name) not in (None, expected):
            raise InputError(
                f"{place} is a {kind} layer with {name}={config[name]!r}, expected {expected!r}, one vector a text; "
                "set model.name to another model"
            )
    refuse_unknown(config, keys | NAMES.keys(), f"{place}/{CONFIG}")
    try:
        layer = layer_kind.of(config)
        if layer.state_dict():
            layer.load_state_dict(read_tensors(Path(place), WEIGHTS, OLD_WEIGHTS))
    except Exception as error:
        raise cannot_load(source, error, path) from error
    return layer


def refuse_unknown(config: dict[str, Any], known: set[str], file: str) -> None:
    """Raise InputError for a key with a value that we do not know: it could change the embedding."""
    unknown = sorted(key for key, value in config.items() if key not in known and value not in (None, False, "", [], {}))
    if unknown:
        raise InputError(
            f"{file} has {unknown[0]}={config[unknown[0]]!r}, which negpool does not know, and it may change the embedding; "
            "take it out if it does not, or set model.name to another model"
        )


def _activation(name: str) -> nn.Module:
    """Return a function of torch.nn by its full name; a name is looked up there, and nothing is imported by it."""
    place, _, kind = name.rpartition(".")
    found = nn.Identity if name == IDENTITY else getattr(torch.nn.modules.activation, kind, None)
    is_function = isinstance(found, type) and issubclass(found, nn.Module) and place.startswith("torch.nn")
    if not is_function:
        raise InputError(
            f"a Dense layer has the activation {name}, expected one of torch.nn.modules.activation; "
            "set model.name to another model"
        )
    return found()  # type: ignore[misc]
