"""What a model's folder says of its use: pooling, layers behind it, normalisation, prompts, lengths, width.

Ours say it in negpool.json, those of sentence-transformers in five files, some of which have had other names. Every key is
either followed, or refused with the name of its file: an embedding that differs a little from the model's own is worse than an
error.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from trainer.encoder.layers import Layer, read_layer, refuse_unknown
from trainer.encoder.pooling import MODES
from trainer.encoder.prompts import prefixes_of
from trainer.encoder.settings import Traits
from trainer.encoder.source import read_json
from trainer.encoder.st_modules import TOKENS, Module, chains_of
from trainer.errors import InputError

TRAITS_FILE, ST_FILE = "negpool.json", "config_sentence_transformers.json"
# The configuration of a Transformer module, the names of which the first that is there counts
TRANSFORMER_FILES = [
    f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
# Its keys that name arguments -> how they are called since version 5.2 of sentence-transformers
OLD_ARGUMENTS = {"tokenizer_args": "processor_kwargs", "config_args": "config_kwargs", "model_args": "model_kwargs"}
NOT_ARGUMENTS = {"trust_remote_code", "code_revision", "token", "cache_dir", "revision", "local_files_only", "subfolder"}
# Arguments of the model that change its speed or its rounding, and not what it computes
IDLE_ARGUMENTS = {"dtype", "torch_dtype", "attn_implementation", "device_map", "low_cpu_mem_usage", "use_safetensors",
                  "use_cache", "add_pooling_layer"}  # fmt: skip
IDLE_KEYS = {"unpad_inputs", "do_lower_case", "max_seq_length", "query_length", "document_length", *OLD_ARGUMENTS.values()}
LAST_STATES = ({"method": "forward", "method_output_name": "last_hidden_state"},
               {"method": "forward", "method_output_name": ["last_hidden_state"]})  # fmt: skip
POOLING_KEYS = {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt"}
OLD_FLAG = "pooling_mode_"  # begins the keys by which folders before version 5 of sentence-transformers name poolings
IN_WORDS = {str: "text", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a folder says of the encoder of one side, or of both."""

    source: str  # the model's folder
    transformer: str  # folder of the transformer and its tokenizer
    layers: tuple[Module, ...] = ()  # behind the pooling, but for a last Normalize
    traits: dict[str, Any] = field(default_factory=dict)  # by the names of `Traits`
    lower_case: bool = False
    tokenizer_args: dict[str, Any] = field(default_factory=dict)
    config_args: dict[str, Any] = field(default_factory=dict)

    def read_layers(self) -> list[Layer]:
        """Return the layers behind the pooling, with their weights; raises InputError."""
        return [read_layer(self.source, module.kind, module.path) for module in self.layers]


def read_recorded(source: str, names_pooling: bool = True) -> list[Recorded]:
    """Return what a folder says of its encoder, or of that of queries and that of passages; raises InputError.

    names_pooling: refuse a pooling that is none of ours; otherwise it is not looked at.
    """
    own = read_json(source, TRAITS_FILE)
    own = checked_traits({f.name: own[f.name] for f in fields(Traits) if f.name in own}, f"{source}/{TRAITS_FILE}")
    chains = chains_of(source)  # first: a file of another sort of model has keys of its own
    of_model = _of_model(source)
    return [_read_chain(source, chain, of_model, own, names_pooling) for chain in chains]


def checked_traits(traits: dict, source: str) -> dict:
    """Return traits as they are; raises InputError for one of another type than `Traits` says."""
    for trait in fields(Traits):
        kinds = get_args(trait.type) if isinstance(trait.type, UnionType) else (trait.type,)
        if trait.name in traits and type(traits[trait.name]) not in kinds:
            raise InputError(
                f"{source} says {trait.name}={traits[trait.name]!r}, expected {IN_WORDS[kinds[0]]}; "  # type: ignore[index]
                "mend it, or set model.name to another model"
            )
    return traits


def _read_chain(source: str, chain: list[Module], of_model: dict, own: dict, names_pooling: bool) -> Recorded:
    transformer = str(Path(source) / chain[0].path)
    config = _transformer_config(transformer)
    arguments = {name: _arguments(config, name, transformer) for name in OLD_ARGUMENTS.values()}
    unknown = sorted(arguments["model_kwargs"].keys() - IDLE_ARGUMENTS)
    if unknown:
        raise InputError(
            f"{transformer} gives its model the argument {unknown[0]}={arguments['model_kwargs'][unknown[0]]!r}, which negpool "
            "does not know; take it out if the embedding does not depend on it, or set model.name to another model"
        )
    layers = chain[2:]
    while layers and layers[-1].kind == "Normalize":
        read_layer(source, *layers[-1])  # one of something else than the embedding is refused
        layers = layers[:-1]
    traits = {**of_model, **_lengths(config, arguments["processor_kwargs"])}
    if len(chain) > 1 and chain[-1].kind != "Normalize":
        traits |= _similarity(source)
    if len(chain) > 1:
        traits |= _pooling(source, chain[1], names_pooling)
    return Recorded(
        source=source,
        transformer=transformer,
        layers=tuple(layers),
        traits={**checked_traits(traits, source), **own},
        lower_case=bool(config.get("do_lower_case")),
        tokenizer_args=arguments["processor_kwargs"],
        config_args=arguments["config_kwargs"],
    )


def _of_model(source: str) -> dict[str, Any]:
    """Return what is said of the model as a whole."""
    config = read_json(source, ST_FILE)
    known = {"__version__", "model_type", "requirements", "prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim"}
    refuse_unknown(config, known, f"{source}/{ST_FILE}")
    width = config.get("truncate_dim")
    return prefixes_of(config, f"{source}/{ST_FILE}") | ({} if width is None else {"width": width})


def _similarity(source: str) -> dict[str, bool]:
    """Return whether embeddings that a folder leaves as long as they are become of unit length: not for products."""
    name = read_json(source, ST_FILE).get("similarity_fn_name")
    if name in ("euclidean", "manhattan"):
        raise InputError(
            f"{source} compares embeddings by {name} distance, and negpool by products; "
            "set similarity_fn_name in its config_sentence_transformers.json, or model.name to another model"
        )
    return {"normalize": False} if name == "dot" else {}


def _transformer_config(folder: str) -> dict[str, Any]:
    """Return the configuration of a Transformer module; raises InputError for what we cannot do."""
    for name in TRANSFORMER_FILES:
        if config := read_json(folder, name):
            break
    else:
        return {}
    config = {OLD_ARGUMENTS.get(key, key): value for key, value in config.items()}
    text = config.pop("modality_config", None) or {"text": LAST_STATES[0]}
    task, output = config.pop("transformer_task", None), config.pop("module_output_name", None)
    if config.get("query_expansion"):
        raise InputError(f"{folder}/{name} has query_expansion: {TOKENS}; set model.name to another model")
    usual = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings", "modality_config": ["text"]}
    found = {"transformer_task": task, "module_output_name": output, "modality_config": sorted(text)}
    odd = [f"{key}={value!r}" for key, value in found.items() if value not in (None, usual[key])]
    if odd:
        raise InputError(
            f"{folder}/{name} has {', '.join(odd)}, expected a model of texts that gives token_embeddings, without a chat "
            "template; set model.name to another model"
        )
    if text.get("text") not in LAST_STATES:
        raise InputError(
            f"{folder}/{name} takes {text.get('text')} of its model, expected the last layer's states; set model.name to another"
        )
    refuse_unknown(config, IDLE_KEYS, f"{folder}/{name}")
    return config


def _arguments(config: dict, name: str, folder: str) -> dict[str, Any]:
    arguments = config.get(name) or {}
    if not isinstance(arguments, dict):
        raise InputError(f"{folder} has {name}={arguments!r}, expected an object; set model.name to a whole model")
    return {key: value for key, value in arguments.items() if key not in NOT_ARGUMENTS}


def _lengths(config: dict, tokenizer_args: dict) -> dict[str, int]:
    """Return the longest texts, in tokens, as sentence-transformers finds them."""
    both = tokenizer_args.get("model_max_length") or config.get("max_seq_length")
    found = {"max_query_tokens": config.get("query_length") or both, "max_passage_tokens": config.get("document_length") or both}
    return {name: tokens for name, tokens in found.items() if tokens}


def _pooling(source: str, module: Module, names_pooling: bool) -> dict[str, Any]:
    """Return our name of a folder's pooling, those of several joined by "+", and whether it takes prompts in."""
    if module.kind == "LatentPooling":
        return {"pooling": "latent"} if names_pooling else {}
    config = read_json(source, f"{module.path}/config.json")
    flags = [key for key in config if key.startswith(OLD_FLAG)]
    refuse_unknown(
        config, POOLING_KEYS | {f"{OLD_FLAG}{flag}" for _, flag in MODES.values()}, f"{source}/{module.path}/config.json"
    )
    found = {} if config.get("include_prompt", True) else {"include_prompt": False}
    if not names_pooling:
        return found
    named = config.get("pooling_mode")
    if named is None and flags:  # they are joined in this order, whatever theirs in the file
        modes = [ours for ours, (_, flag) in MODES.items() if config.get(f"{OLD_FLAG}{flag}") is True]
    else:
        of_theirs = {theirs: ours for ours, (theirs, _) in MODES.items()}
        modes = [of_theirs.get(name, "") for name in ([named] if isinstance(named, str) else named or [])]
    if not all(modes):
        raise InputError(
            f"{source} uses pooling {named}, expected one of {', '.join(theirs for theirs, _ in MODES.values())}; "
            "set model.pooling to train with another"
        )
    return {**found, "pooling": "+".join(modes or ["mean"])}
