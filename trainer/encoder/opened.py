"""Opens a model's folder: what it records, its tokenizer, and the layers behind its transformer."""

from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.encoder.latent import LatentAttention
from trainer.encoder.layers import Dense, Dropout, Layer, width_behind
from trainer.encoder.peft_folder import base_of, transformer_of
from trainer.encoder.recorded import Recorded, read_recorded
from trainer.encoder.settings import ModelSettings, Traits
from trainer.encoder.source import cannot_load, resolve_model
from trainer.encoder.st_writer import LATENT_FOLDER
from trainer.encoder.tokenizer import load_tokenizer, tokenizer_content
from trainer.errors import InputError


def describe(settings: ModelSettings, with_weights: bool = True) -> list[Recorded]:
    """Return what a model's folder says of its encoder, or of each of two; raises InputError."""
    source = resolve_model(settings.name, with_weights)
    base = base_of(source, with_weights)
    if base is None or (Path(source) / "modules.json").is_file():
        return read_recorded(source, names_pooling=settings.pooling is None)
    # Adapters are used as their base is.
    towers = read_recorded(base, names_pooling=settings.pooling is None)
    return [replace(recorded, transformer=source) for recorded in towers[:1]]


def open_tokenizer(recorded: Recorded) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside a transformer, or that of the base of adapters that come without one."""
    folder = Path(recorded.transformer)
    base = None if any(folder.glob("tokenizer*")) or any(folder.glob("vocab*")) else base_of(str(folder))
    source = str(folder) if base is None else transformer_of(base)
    return load_tokenizer(source, recorded.lower_case, **recorded.tokenizer_args)


def latent_pooling(recorded: Recorded, settings: ModelSettings, model: PreTrainedModel) -> LatentAttention:
    """Return the folder's latent attention, or a new one."""
    folder = Path(recorded.transformer) / LATENT_FOLDER
    if folder.is_dir():
        try:
            return LatentAttention.read(folder)
        except Exception as error:
            raise cannot_load(recorded.source, error, LATENT_FOLDER) from error
    return LatentAttention(model.config.hidden_size, settings.latents)


def layers_behind(recorded: Recorded, settings: ModelSettings, width: int) -> list[Layer]:
    """Return the folder's layers behind the pooling, and the new one that the job asks for."""
    found = recorded.read_layers()
    for layer in found:
        if isinstance(layer, Dropout) and settings.dropout is not None:
            layer.p = settings.dropout
    for place, layer in enumerate(found):
        needs = layer.linear.in_features if isinstance(layer, Dense) else layer.config().get("dimension")
        if needs not in (None, width_behind(found[:place], width)):
            raise InputError(
                f"{recorded.source} has a {type(layer).__name__} for vectors of {needs} numbers, and gives it "
                f"{width_behind(found[:place], width)}; set model.pooling to the folder's, or model.name to a whole model"
            )
    out_width = width_behind(found, width)
    dense = [layer for layer in found if isinstance(layer, Dense)]
    if settings.projection is None or (dense and out_width == settings.projection):
        return found
    if dense:
        raise InputError(
            f"model.projection={settings.projection}, but {settings.name} has a projection to {out_width}; "
            "leave model.projection out, or set model.name to a model without"
        )
    return [*found, Dense(out_width, settings.projection)]


def shared_traits(query: tuple, passage: tuple, name: str) -> Traits:
    """Return the traits of two towers; raises InputError where they differ in what we keep once."""
    if tokenizer_content(query[1]) != tokenizer_content(passage[1]):
        raise InputError(f"the towers of {name} have tokenizers of their own, expected one for both; set model.name to another")
    traits = replace(query[2], max_passage_tokens=passage[2].max_passage_tokens)
    for key, value in asdict(traits).items():
        if getattr(passage[2], key) != value and key != "max_query_tokens":
            raise InputError(
                f"the two towers of {name} are used differently: {key} is {value!r} and {getattr(passage[2], key)!r}; "
                f"set model.{key}"
            )
    if query[0].width != passage[0].width:
        raise InputError(
            f"the two towers of {name} give vectors of {query[0].width} and {passage[0].width} numbers, expected equal widths; "
            "set model.name to another model"
        )
    return traits
