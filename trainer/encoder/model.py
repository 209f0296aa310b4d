"""The encoder: a transformer, a pooling, layers behind it and a normalisation, from a folder, a hub name or a PyPI package.

What it saves is a folder that `SentenceTransformer`, `AutoModel` and `mteb` load as it is, adapters merged. Pooling,
normalisation, prefixes and lengths are recorded there, so a reader of the folder needs no job file.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trainer.encoder.architecture import load_config, untrained_pooler
from trainer.encoder.backbone import bare_backbone, is_causal, load_backbone
from trainer.encoder.card import write_card
from trainer.encoder.latent import LatentAttention
from trainer.encoder.layers import Dropout, Layer, save_layer, width_behind
from trainer.encoder.lora import add_adapters, merged_weights
from trainer.encoder.opened import describe, latent_pooling, layers_behind, open_tokenizer, shared_traits
from trainer.encoder.pooling import num_poolings, pooling_of
from trainer.encoder.recorded import TRAITS_FILE, Recorded
from trainer.encoder.settings import ModelSettings, Traits
from trainer.encoder.source import cannot_load
from trainer.encoder.st_writer import LATENT_FOLDER, TOWER_FOLDERS, layer_folder, not_expressed, write_description, write_router
from trainer.encoder.towers import SIDES, Encoder, TwoTowers
from trainer.encoder.traits import settle_traits, settle_width
from trainer.errors import InputError

log = logging.getLogger(__name__)

# Of weights that no folder has: every rank and every start must draw the same ones.
NEW_WEIGHTS_SEED = 0


def load_encoder(settings: ModelSettings, is_empty: bool = False) -> tuple[Encoder, PreTrainedTokenizerBase, Traits]:
    """Return the encoder (float32, in training mode), its tokenizer and its traits; raises InputError.

    is_empty: all parameters are on the meta device, and the files of the transformer are not read.
    Weights that the folder does not have (adapters, latent pooling, projection) are the same on every rank and at every start.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    towers = describe(settings)
    if len(towers) == 2 and settings.towers == "one":
        raise InputError(f'{settings.name} has two towers; leave model.towers out, or set it to "two"')
    if len(towers) == 1 and settings.towers != "two":
        return _load_tower(towers[0], settings, is_empty)
    query, passage = (_load_tower(recorded, settings, is_empty) for recorded in (towers[0], towers[-1]))
    return TwoTowers(query[0], passage[0]).train(), query[1], shared_traits(query, passage, settings.name)


def _load_tower(recorded: Recorded, settings: ModelSettings, is_empty: bool) -> tuple[Encoder, PreTrainedTokenizerBase, Traits]:
    try:
        model = load_backbone(recorded.transformer, settings, is_empty, **recorded.config_args)
        tokenizer = open_tokenizer(recorded)
    except Exception as error:
        raise cannot_load(settings.name, error) from error
    traits = settle_traits(recorded, settings, model, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(NEW_WEIGHTS_SEED)
        if settings.lora_rank:
            add_adapters(model, settings)
        pool = latent_pooling(recorded, settings, model) if traits.pooling == "latent" else pooling_of(traits.pooling)
        width = num_poolings(traits.pooling) * model.config.hidden_size
        layers = layers_behind(recorded, settings, width)
    traits = settle_width(traits, settings, width_behind(layers, width))
    assert pool is not None, "an unknown one was refused with the traits"
    encoder = Encoder(model, pool, layers, traits).train()
    return _emptied(encoder) if is_empty else encoder, tokenizer, traits


def _emptied(encoder: Encoder) -> Encoder:
    """Put what was made beside the transformer on the meta device, too; buffers stay."""
    for module in encoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))
    return encoder


def load_text_rules(settings: ModelSettings) -> tuple[PreTrainedTokenizerBase, Traits]:
    """Return the tokenizer and the traits that `load_encoder` returns, without reading a weight; raises InputError.

    But for `Traits.width`, which does not reach texts.
    """
    transformers_logging.set_verbosity_error()
    towers = []
    for recorded in describe(settings, with_weights=False):
        try:
            model = bare_backbone(recorded.transformer, settings, **recorded.config_args)
            tokenizer = open_tokenizer(recorded)
        except Exception as error:
            raise cannot_load(settings.name, error) from error
        towers.append((tokenizer, settle_traits(recorded, settings, model, tokenizer)))
    (tokenizer, traits), (_, of_passages) = towers[0], towers[-1]
    return tokenizer, replace(traits, max_passage_tokens=of_passages.max_passage_tokens)


def check_model(name: str) -> None:
    """Raise InputError if a name leads to no model; reads its configuration, not its weights."""
    try:
        for recorded in describe(ModelSettings(name=name, pooling="mean"), with_weights=False):
            load_config(recorded.transformer, **recorded.config_args)
    except Exception as error:
        raise cannot_load(name, error) from error


def save_encoder(
    folder: Path,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    traits: Traits,
    weights: Mapping[str, Tensor] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that sentence-transformers, transformers and we can load; the encoder stays as it is.

    weights: `encoder.state_dict()` in whole tensors, where the encoder's own are sharded.
    origin: what is known of how the model was made, for its card (see card.py).
    Memory: a copy, in the host's memory, of the weights that have adapters.
    """
    plain = _plain_weights(encoder, weights)
    lost = list(not_expressed(traits, isinstance(encoder, TwoTowers)))
    if isinstance(encoder, TwoTowers):
        for side, name in zip(SIDES, TOWER_FOLDERS, strict=True):
            (folder / name).mkdir()
            _save_tower(folder / name, encoder.side(side), tokenizer, traits, _below(plain, f"{side}."), lost)
        write_router(folder, traits)
        _write_traits(folder, traits, lost)
    else:
        _save_tower(folder, encoder, tokenizer, traits, plain, lost)
    write_card(folder, traits, encoder.width, origin or {}, lost)
    if lost:
        _warn_once("; ".join(lost))


def _save_tower(
    folder: Path,
    tower: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    traits: Traits,
    plain: Mapping[str, Tensor],
    lost: list[str],
) -> None:
    with _as_if_not_quantized(tower.model):
        tower.model.save_pretrained(folder, state_dict=_below(plain, "model.") | untrained_pooler(tower.model))
    tokenizer.save_pretrained(folder)
    layers: list[Layer] = list(tower.dense)  # type: ignore[arg-type]
    write_description(folder, traits, tower.state_width, [type(layer).__name__ for layer in layers])
    if isinstance(tower.pool, LatentAttention):
        tower.pool.save(folder / LATENT_FOLDER, _below(plain, "pool."))
    for i, layer in enumerate(layers):
        save_layer(folder / layer_folder(i, type(layer).__name__), layer, _below(plain, f"dense.{i}."))
    _write_traits(folder, traits, lost)


def _write_traits(folder: Path, traits: Traits, lost: list[str]) -> None:
    (folder / TRAITS_FILE).write_text(json.dumps({**asdict(traits), "not_expressed": lost}, indent=1) + "\n")


def weights_digest(encoder: Encoder, weights: Mapping[str, Tensor] | None = None) -> str:
    """Return the SHA-256 over all weights, adapters merged, and what else decides the embedding of given tokens, but for the
    pooling: equal in memory and after loading.

    weights: as `save_encoder` takes them.
    """
    decides: list[Any] = [encoder.normalize, is_causal(encoder.side("query").model)]
    layers, cut = described_layers(encoder), encoder.side("query").cut
    if any(layers) or cut is not None:
        decides += [layers, cut]
    digest = hashlib.sha256(json.dumps(decides).encode())
    state = encoder.state_dict() if weights is None else weights
    hash_tensors(digest, merged_weights(encoder, dict(sorted(state.items()))))
    return digest.hexdigest()


def described_layers(encoder: Encoder) -> list:
    """Return what the layers behind the pooling are, weights aside, of the encoder or of each of two."""
    sides = [encoder.side(side) for side in (SIDES if encoder.has_two_towers else SIDES[:1])]
    return [
        [[type(layer).__name__, layer.config()] for layer in side.dense if not isinstance(layer, Dropout)]  # type: ignore[operator]
        for side in sides
    ]


def hash_tensors(digest: "hashlib._Hash", tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Add named tensors to a digest: names, shapes, types and all bytes."""
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _plain_weights(encoder: Encoder, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return dict(merged_weights(encoder, encoder.state_dict() if weights is None else weights))


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


@contextmanager
def _as_if_not_quantized(model: PreTrainedModel) -> Iterator[None]:
    """Let transformers save the float32 weights that it is given for a quantised model."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        yield
        return
    config = model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config
    try:
        yield
    finally:
        model.hf_quantizer, model.config.quantization_config = quantizer, config


@functools.cache
def _warn_once(sentence: str) -> None:
    log.warning(sentence)
