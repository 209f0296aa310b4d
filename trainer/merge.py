"""Several models of one architecture to one: weights are averaged, nothing is trained.

One model is in memory besides the merged one and the base; only safetensors are read. What comes out is a folder like any
other model's, whole or absent, whose manifest says what went in.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.encoder.backbone import DROPOUT_NAMES
from trainer.encoder.model import (
    Encoder,
    ModelSettings,
    Traits,
    described_layers,
    load_encoder,
    save_encoder,
    weights_digest,
)
from trainer.encoder.source import resolve_model
from trainer.errors import InputError
from trainer.handoff.manifest import publish_version

HOW = ("mean", "delta")
# of a configuration: says nothing about what the weights compute
NOT_ARCHITECTURE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", *DROPOUT_NAMES}
Loaded = tuple[Encoder, PreTrainedTokenizerBase, Traits]


def merge_models(
    out: Path, models: Sequence[str], how: str = "mean", base: str | None = None, weights: Sequence[float] | None = None
) -> dict[str, Any]:
    """Write the weighted mean of models into the folder `out`, and return what its manifest says of it.

    mean: merged = sum_k w_k model_k / sum_k w_k, as in model soups (Wortsman et al. 2022, arXiv 2203.05482).
    delta: the same for each tensor by itself, with w_k times how far training has moved it, so that a tensor comes mostly
    from the models that learnt something there:

        merged = base + sum_k c_k (model_k - base) / sum_k c_k,   c_k = w_k ||model_k - base||_2

    and the base where no model has moved. Source: delta-guided fusion of CoDiEmb (arXiv 2508.11442), as we read it: one
    weight for each tensor of each model, proportional to the norm of its deviation from the initialisation.
    weights: w_k, one for each model, 0 or more; None: equal. base: needed by "delta".
    Raises InputError for models that do not fit together, and where `out` exists.
    """
    weights = [1.0] * len(models) if weights is None else list(weights)
    _check_request(out, models, how, base, weights)
    base_weights = None if base is None else _load(base)[0].state_dict()
    merged: Loaded | None = None
    totals: dict[str, float] = {}
    digests = []
    for name, weight in zip(models, weights, strict=True):
        loaded = _load(name)
        digests.append(weights_digest(loaded[0]))
        if base_weights is not None:
            _refuse_other_tensors(base_weights, loaded[0].state_dict(), str(base), name)
        if merged is None:
            merged = loaded
        else:
            _refuse_difference(merged, loaded, models[0], name)
        _blend(merged[0].state_dict(), loaded[0].state_dict(), base_weights, weight, totals)
    assert merged is not None, "two models or more"
    return _publish(out, merged, {"how": how, "base": base, "models": list(models), "weights": weights, "digests": digests})


def _check_request(out: Path, models: Sequence[str], how: str, base: str | None, weights: list[float]) -> None:
    if out.exists():
        raise InputError(f"{out} exists already; name a folder that does not, or delete it")
    if len(models) < 2:
        raise InputError(f"a merge takes two models or more, found {len(models)}")
    if (how == "delta") != (base is not None):
        raise InputError("--how delta needs --base, the model that training began from, and --how mean has no use for it")
    if len(weights) != len(models) or not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) == 0:
        raise InputError(
            f"{len(weights)} weights {weights} for {len(models)} models; expected one of 0 or more for each, not all 0"
        )


def _load(name: str) -> Loaded:
    """Return a model from a folder of safetensors."""
    folder = Path(resolve_model(name))
    if not any(folder.rglob("*.safetensors")):
        raise InputError(f"{folder} holds no safetensors, and nothing else is read; save its weights as safetensors first")
    return load_encoder(ModelSettings(name=name))


def _refuse_difference(first: Loaded, other: Loaded, first_name: str, name: str) -> None:
    """Raise InputError, naming what differs, if two models cannot be averaged."""
    configs = [encoder.model.config.to_dict() for encoder, _, _ in (first, other)]
    for key in sorted((configs[0].keys() | configs[1].keys()) - NOT_ARCHITECTURE):
        before, after = (config.get(key) for config in configs)
        if before != after:
            raise InputError(f"{first_name} and {name} are of two architectures: {key} is {before!r} and {after!r}")
    _refuse_other_tensors(first[0].state_dict(), other[0].state_dict(), first_name, name)
    traits = [asdict(loaded[2]) for loaded in (first, other)]
    for key, before in traits[0].items():
        if before != traits[1][key]:
            raise InputError(f"{first_name} and {name} are used differently: {key} is {before!r} and {traits[1][key]!r}")
    layers = [described_layers(loaded[0]) for loaded in (first, other)]
    if layers[0] != layers[1]:
        raise InputError(f"{first_name} and {name} have other layers behind their pooling: {layers[0]} and {layers[1]}")
    if first[1].get_vocab() != other[1].get_vocab():
        raise InputError(f"{first_name} and {name} have different vocabularies; only models of one tokenizer can be merged")


def _refuse_other_tensors(first: dict[str, Tensor], other: dict[str, Tensor], first_name: str, name: str) -> None:
    for key in sorted(first.keys() | other.keys()):
        found = [list(tensors[key].shape) if key in tensors else "absent" for tensors in (first, other)]
        if found[0] != found[1]:
            raise InputError(f"{first_name} and {name} do not fit together: {key} is {found[0]} and {found[1]}")


@torch.no_grad()
def _blend(
    merged: dict[str, Tensor],
    model: dict[str, Tensor],
    base: dict[str, Tensor] | None,
    weight: float,
    totals: dict[str, float],
) -> None:
    """Move the running means towards one more model. totals: the sums of each tensor's weights so far."""
    for name, tensor in model.items():
        if not tensor.is_floating_point():
            continue  # positions and the like, which training does not change
        share = weight if base is None else weight * float((tensor - base[name]).double().norm())
        totals[name] = totals.get(name, 0.0) + share
        if share:
            # A step of the difference leaves what all models agree on as it is, to the last bit.
            merged[name].lerp_(tensor, share / totals[name])


def _publish(out: Path, merged: Loaded, origin: dict[str, Any]) -> dict[str, Any]:
    encoder, tokenizer, traits = merged
    fields = {"merged": origin, "weights_digest": weights_digest(encoder)}
    parts = zip(origin["models"], origin["weights"], strict=True)
    made = {
        "base": origin["base"],
        "merged": f"{origin['how']} of " + ", ".join(f"{weight:g} x {Path(name).name}" for name, weight in parts),
    }
    publish_version(out, lambda folder: save_encoder(folder, encoder, tokenizer, traits, origin=made), fields)
    return {"out": str(out), **origin, "weights_digest": fields["weights_digest"]}
