"""A folder that holds PEFT adapters alone: its base is found, and the adapters are added to the base's weights.

What is trained then is the sum, or new adapters beside it.
"""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trainer.encoder.source import cannot_load, read_json, resolve_model
from trainer.encoder.st_modules import chains_of
from trainer.encoder.tensors import read_tensors
from trainer.errors import InputError

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BASE = "base_model_name_or_path"
OF_PEFT = "base_model.model."  # begins PEFT's names of a model's tensors


def base_of(folder: str, with_weights: bool = True) -> str | None:
    """Return the folder of the model that a folder's adapters belong to, None where it holds none; raises InputError."""
    if not (Path(folder) / CONFIG).is_file():
        return None
    named = read_json(folder, CONFIG).get(BASE)
    if not isinstance(named, str) or not named:
        raise InputError(f"{folder}/{CONFIG} names no {BASE}; set it there to the folder or hub name of the adapters' base")
    beside = Path(folder) / named
    try:
        return resolve_model(str(beside) if beside.is_dir() and not Path(named).is_dir() else named, with_weights)
    except InputError as error:
        raise InputError(
            f"{folder} holds adapters of {named}, which is not here; put the base there, or set {BASE} in {folder}/{CONFIG} to "
            "the folder or hub name where it is"
        ) from error


def transformer_of(base: str) -> str:
    """Return the folder of a base's transformer; raises InputError for a base of two towers, and one that is adapters itself."""
    chains = chains_of(base)
    transformer = os.path.join(base, chains[0][0].path)
    if len(chains) > 1 or (Path(transformer) / CONFIG).is_file():
        raise InputError(f"{base}, the base of adapters, is no single whole model; set {BASE} in their {CONFIG} to one")
    return transformer


def add_to_weights(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Return the model with a folder's adapters added to its weights; raises InputError for what does not fit the model."""
    try:
        from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    except ImportError as error:
        raise InputError(
            f"{folder} holds adapters, which need PEFT; run: pip install 'negpool[lora]', or set model.name to a whole model"
        ) from error
    try:
        config = PeftConfig.from_pretrained(folder)
        if config.is_prompt_learning:
            raise InputError(f"{folder} holds trained prompts, expected adapters; set model.name to another model")
        weights = read_tensors(Path(folder), WEIGHTS, OLD_WEIGHTS)
        wrapped = PeftModel(model, config)
        head = f"{OF_PEFT}{model.base_model_prefix}."  # of adapters that were trained below a head
        found: Any = set_peft_model_state_dict(wrapped, {name.replace(head, OF_PEFT): tensor for name, tensor in weights.items()})
    except Exception as error:
        raise cannot_load(folder, error, WEIGHTS) from error
    own = {name for name in found.missing_keys if wrapped.prefix in name}
    if own or found.unexpected_keys:
        name = min([*own, *found.unexpected_keys])
        raise InputError(
            f"the adapters in {folder} do not fit their base: {name} is of one of the two alone; set {BASE} in {CONFIG} to theirs"
        )
    return wrapped.merge_and_unload().requires_grad_()  # PEFT has frozen the weights
