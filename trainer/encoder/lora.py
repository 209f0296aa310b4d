"""Low-rank adapters by PEFT, trained in the place of the weights, and added to the weights where a model is saved.

Source: LoRA, arXiv 2106.09685. Nothing is merged in the model that is trained: its weights stay as they are, bit for bit.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from trainer.encoder.dropout import replace_dropout
from trainer.encoder.settings import ModelSettings
from trainer.errors import InputError

ADAPTER, BASE = "default", ".base_layer"  # PEFT's names of an adapter, and of the layer below it


def add_adapters(model: nn.Module, settings: ModelSettings) -> None:
    """Freeze a model and put trained adapters into it; raises InputError if none of its layers is meant."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(
            f"model.lora_rank={settings.lora_rank} needs PEFT; run: pip install 'negpool[lora]', or set model.lora_rank=0"
        ) from error
    targets = settings.lora_targets
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=targets if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets),
    )
    linear = sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    try:
        inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        raise InputError(
            f"model.lora_targets={targets!r} names no layer of the model; its linear layers are {', '.join(linear)}, "
            'or set "all-linear"'
        ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    replace_dropout(model)


def merged_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a module as if it had no adapters, name by name, each merged, on the CPU, when it is asked for.

    weights: what `module.state_dict()` returns, or the same whole tensors where its own are sharded.
    """
    for name, tensor in weights.items():
        if ".lora_" in name or ".weight." in name:
            continue  # adapters themselves, and what a quantised weight keeps beside it
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight":
            tensor = _plain(module.get_submodule(owner), tensor)
            if owner.endswith(BASE):
                owner = owner.removesuffix(BASE)
                tensor = _adapted(module.get_submodule(owner), owner, tensor, weights)
        yield f"{owner.removesuffix(BASE)}.{leaf}", tensor


def _adapted(layer, owner: str, base: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    down, up = (weights[f"{owner}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
    return (base + layer.scaling[ADAPTER] * (up @ down)).cpu()


def _plain(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight as it is, a quantised one in float32."""
    if not hasattr(layer.weight, "quant_state"):
        return weight
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).float()
