"""What a folder's configuration says of its transformer: a class of transformers, for texts, without code of its own."""

import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from trainer.encoder.peft_folder import base_of, transformer_of
from trainer.encoder.source import read_json
from trainer.errors import InputError

log = logging.getLogger(__name__)


def load_config(source: str, **arguments) -> PretrainedConfig:
    """Return the configuration of a model that turns token ids into states; raises InputError for others."""
    base = base_of(source, with_weights=False)
    source = source if base is None else transformer_of(base)
    refuse_code(source)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **arguments)
    if config.is_encoder_decoder:
        raise InputError(
            f"{source} is an encoder with a decoder ({config.model_type}), expected one of the two; set model.name to another"
        )
    kind = kind_of(config)
    if getattr(kind, "main_input_name", "input_ids") != "input_ids":
        raise InputError(
            f"{source} ({config.model_type}) reads {kind.main_input_name}, expected a model of texts; set model.name to another"
        )
    return config


def refuse_code(source: str) -> None:
    """Raise InputError for a model that is computed by code in its folder, unless transformers has taken that model over."""
    config = read_json(source, "config.json")
    known: dict[str, str | None] = {"AutoConfig": None, "AutoModel": None}
    if config.get("model_type") in CONFIG_MAPPING:
        of_type = CONFIG_MAPPING[config["model_type"]]
        of_model = MODEL_MAPPING.get(of_type, None)
        known = {"AutoConfig": of_type.__name__, "AutoModel": getattr(of_model, "__name__", None)}
    for name, code in (config.get("auto_map") or {}).items():
        if name in known and str(code).rpartition(".")[2] != known[name]:
            raise InputError(
                f"{source} is computed by code of its own ({code}), which negpool never runs; set model.name to a model that "
                "transformers has, without auto_map in its config.json"
            )
    if config.get("auto_map"):
        log.warning("%s brings code of its own, which is not run; transformers' own %s is used", source, known["AutoModel"])


def without_pooler(config: PretrainedConfig) -> dict:
    """Return the argument that leaves a pooler out: it takes no part in an embedding."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind_of(config)).parameters else {}


def untrained_pooler(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return zeros for the pooler that transformers' class has and ours is loaded without.

    Without them whoever loads the folder is told of missing weights, and gets random ones; with zeros a `pooler_output` is 0.
    """
    if not without_pooler(model.config):
        return {}
    with torch.device("meta"):
        pooler = getattr(kind_of(model.config)(model.config), "pooler", None)
    return {} if pooler is None else {f"pooler.{name}": torch.zeros(t.shape) for name, t in pooler.state_dict().items()}


def kind_of(config: PretrainedConfig) -> Any:
    """Return the class of a configuration's model."""
    if type(config) not in MODEL_MAPPING:
        raise InputError(f"models of type {config.model_type} have no token states; set model.name to an encoder or a decoder")
    return MODEL_MAPPING[type(config)]
