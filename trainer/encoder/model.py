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
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trainer.encoder.backbone import bare_backbone, is_causal, load_backbone, load_config, max_positions
from trainer.encoder.dense import Dense, save_dense
from trainer.encoder.latent import LatentAttention
from trainer.encoder.lora import add_adapters, merged_weights
from trainer.encoder.pooling import POOLINGS
from trainer.encoder.settings import ModelSettings, Traits
from trainer.encoder.source import cannot_load, read_json, resolve_model
from trainer.encoder.st_folder import (
    LATENT_FOLDER,
    TOWER_FOLDERS,
    checked_traits,
    dense_folder,
    not_expressed,
    read_dense_layers,
    read_traits,
    tower_folders,
    write_description,
    write_router,
)
from trainer.encoder.tokenizer import append_eos, check_belongs, load_tokenizer
from trainer.encoder.towers import SIDES, Encoder, TwoTowers
from trainer.errors import InputError

log = logging.getLogger(__name__)

TRAITS_FILE = "negpool.json"
# Of weights that no folder has: every rank and every start must draw the same ones.
NEW_WEIGHTS_SEED = 0


def load_encoder(settings: ModelSettings, is_empty: bool = False) -> tuple[Encoder, PreTrainedTokenizerBase, Traits]:
    """Return the encoder (float32, in training mode), its tokenizer and its traits; raises InputError.

    is_empty: all parameters are on the meta device, and the files of the transformer are not read.
    Weights that the folder does not have (adapters, latent pooling, projection) are the same on every rank and at every start.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source = resolve_model(settings.name)
    folders = tower_folders(source)
    if folders and settings.towers == "one":
        raise InputError(f'{settings.name} has two towers; leave model.towers out, or set it to "two"')
    if not folders and settings.towers != "two":
        return _load_tower(source, settings, is_empty)
    query, passage = (_load_tower(folder, settings, is_empty) for folder in folders or (source, source))
    return TwoTowers(query[0], passage[0]).train(), *query[1:]


def _load_tower(source: str, settings: ModelSettings, is_empty: bool) -> tuple[Encoder, PreTrainedTokenizerBase, Traits]:
    try:
        model, tokenizer = load_backbone(source, settings, is_empty), load_tokenizer(source)
    except Exception as error:
        raise cannot_load(settings.name, error) from error
    traits = _settle_texts(source, settings, model, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(NEW_WEIGHTS_SEED)
        if settings.lora_rank:
            add_adapters(model, settings)
        pool = _latent(source, settings, model) if traits.pooling == "latent" else POOLINGS[traits.pooling]
        dense = _dense(source, settings, model)
    encoder = Encoder(model, pool, dense, traits.normalize, settings.compile).train()
    return _emptied(encoder) if is_empty else encoder, tokenizer, traits


def _emptied(encoder: Encoder) -> Encoder:
    """Put what was made beside the transformer on the meta device, too; buffers stay."""
    for module in encoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))
    return encoder


def _settle_texts(source: str, settings: ModelSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Traits:
    """Return the traits of a model whose weights are not looked at, and let its tokenizer end texts as they ask for."""
    check_belongs(tokenizer, model, settings.name)
    recorded = _recorded(source, settings)
    traits = _traits(settings, recorded, model, tokenizer.model_max_length)
    ends_new_pooling = traits.pooling == "last" and "pooling" not in recorded and tokenizer.eos_token is not None
    if ends_new_pooling if settings.append_eos is None else settings.append_eos:
        append_eos(tokenizer)
    return traits


def load_text_rules(settings: ModelSettings) -> tuple[PreTrainedTokenizerBase, Traits]:
    """Return the tokenizer and the traits that `load_encoder` returns, without reading a weight; raises InputError."""
    transformers_logging.set_verbosity_error()
    source = resolve_model(settings.name)
    source = (tower_folders(source) or [source])[0]
    try:
        model, tokenizer = bare_backbone(source, settings), load_tokenizer(source)
    except Exception as error:
        raise cannot_load(settings.name, error) from error
    return tokenizer, _settle_texts(source, settings, model, tokenizer)


def check_model(name: str) -> None:
    """Raise InputError if a name leads to no model; reads its configuration, not its weights."""
    try:
        source = resolve_model(name)
        load_config((tower_folders(source) or [source])[0])
    except Exception as error:
        raise cannot_load(name, error) from error


def save_encoder(
    folder: Path,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    traits: Traits,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder that sentence-transformers, transformers and we can load; the encoder stays as it is.

    weights: `encoder.state_dict()` in whole tensors, where the encoder's own are sharded.
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
        tower.model.save_pretrained(folder, state_dict=_below(plain, "model."))
    tokenizer.save_pretrained(folder)
    write_description(folder, traits, tower.state_width, len(tower.dense))
    if isinstance(tower.pool, LatentAttention):
        tower.pool.save(folder / LATENT_FOLDER, _below(plain, "pool."))
    for i, dense in enumerate(tower.dense):
        save_dense(folder / dense_folder(i), dense, _below(plain, f"dense.{i}."))  # type: ignore[arg-type]
    _write_traits(folder, traits, lost)


def _write_traits(folder: Path, traits: Traits, lost: list[str]) -> None:
    (folder / TRAITS_FILE).write_text(json.dumps({**asdict(traits), "not_expressed": lost}, indent=1) + "\n")


def weights_digest(encoder: Encoder, weights: Mapping[str, Tensor] | None = None) -> str:
    """Return the SHA-256 over all weights, adapters merged, and what else decides the embedding of given tokens, but for the
    pooling: equal in memory and after loading.

    weights: as `save_encoder` takes them.
    """
    digest = hashlib.sha256(json.dumps([encoder.normalize, is_causal(encoder.side("query").model)]).encode())
    state = encoder.state_dict() if weights is None else weights
    hash_tensors(digest, merged_weights(encoder, dict(sorted(state.items()))))
    return digest.hexdigest()


def hash_tensors(digest: "hashlib._Hash", tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Add named tensors to a digest: names, shapes, types and all bytes."""
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _recorded(source: str, settings: ModelSettings) -> dict:
    """Return the traits that the folder records, ours before sentence-transformers'."""
    own = read_json(source, TRAITS_FILE)
    if own:
        found = {field.name: own[field.name] for field in fields(Traits) if field.name in own}
        return checked_traits(found, f"{source}/{TRAITS_FILE}")
    return read_traits(source, names_pooling=settings.pooling is None)


def _traits(settings: ModelSettings, recorded: dict, model: PreTrainedModel, tokenizer_max: int) -> Traits:
    """Join what the job says, what the folder says, and the defaults, in this order; raises InputError."""
    limit = min(max_positions(model), tokenizer_max)
    default = Traits(
        pooling="last" if is_causal(model) else "mean",
        normalize=True,
        query_prefix="",
        passage_prefix="",
        max_query_tokens=limit,
        max_passage_tokens=limit,
    )
    of_traits = {field.name for field in fields(Traits)}
    chosen = {key: value for key, value in asdict(settings).items() if key in of_traits and value is not None}
    traits = replace(default, **{**recorded, **chosen})
    for field in ("max_query_tokens", "max_passage_tokens"):
        tokens = getattr(traits, field)
        if not 3 <= tokens <= limit:
            raise InputError(f"model.{field}={tokens} is not between 3 and {limit}, the longest text that {settings.name} takes")
    if traits.pooling not in (*POOLINGS, "latent"):
        raise InputError(f"model.pooling={traits.pooling!r} is unknown; expected one of {', '.join((*POOLINGS, 'latent'))}")
    return traits


def _latent(source: str, settings: ModelSettings, model: PreTrainedModel) -> LatentAttention:
    """Return the folder's latent attention, or a new one."""
    if (Path(source) / LATENT_FOLDER).is_dir():
        try:
            return LatentAttention.read(Path(source) / LATENT_FOLDER)
        except Exception as error:
            raise cannot_load(source, error, LATENT_FOLDER) from error
    return LatentAttention(model.config.hidden_size, settings.latents)


def _dense(source: str, settings: ModelSettings, model: PreTrainedModel) -> list[Dense]:
    """Return the folder's layers behind the pooling, or the new one that the job asks for."""
    found = read_dense_layers(source)
    if settings.projection is None or (found and found[-1].out_width == settings.projection):
        return found
    if found:
        raise InputError(
            f"model.projection={settings.projection}, but {settings.name} has a projection to {found[-1].out_width}; "
            "leave model.projection out, or set model.name to a model without"
        )
    return [Dense(model.config.hidden_size, settings.projection)]


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
