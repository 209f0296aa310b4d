"""How sentence-transformers describes a model: pooling, layers behind it, normalisation, prompts, length.

Read from the folders of others, and written into ours, so that `SentenceTransformer(path)` and `mteb` load them as they are.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from trainer.encoder.dense import Dense, read_dense
from trainer.encoder.settings import Traits
from trainer.encoder.source import read_json
from trainer.errors import InputError

log = logging.getLogger(__name__)

# our name of a pooling -> theirs
POOLING_NAMES = {"mean": "mean", "cls": "cls", "last": "lasttoken", "weighted_mean": "weightedmean"}
# how older folders say it
OLD_FLAGS = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken", "weighted_mean": "weightedmean_tokens"}
LATENT_FOLDER, POOLING_FOLDER = "1_LatentAttention", "1_Pooling"
LATENT_TYPE = "trainer.encoder.latent.LatentPooling"
IN_WORDS = {str: "text", int: "a whole number", bool: "true or false"}
ROUTER = "router_config.json"
TOWER_FOLDERS = ("query", "document")  # each a whole model, named as sentence-transformers names the tasks


def read_traits(source: str, names_pooling: bool) -> dict:
    """Return the traits that a folder's files record, by the names of `Traits`.

    names_pooling: raise InputError if its pooling is none of ours; otherwise the pooling is not looked at.
    """
    settings = read_json(source, "config_sentence_transformers.json")
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict):
        raise InputError(f"{source}/config_sentence_transformers.json has prompts={prompts!r}, expected an object of prompts")
    traits = {"query_prefix": prompts.get("query", ""), "passage_prefix": prompts.get("document", "")}
    if names_pooling:
        pooling = _pooling(source)
        traits |= {} if pooling is None else {"pooling": pooling}
    kinds = [kind for kind, _ in _modules(source)]
    if kinds and "Normalize" not in kinds and settings.get("similarity_fn_name") == "dot":
        traits["normalize"] = False
    if max_tokens := read_json(source, "sentence_bert_config.json").get("max_seq_length"):
        traits |= {"max_query_tokens": max_tokens, "max_passage_tokens": max_tokens}
    return checked_traits(traits, source)


def checked_traits(traits: dict, source: str) -> dict:
    """Return traits as they are; raises InputError for one of another type than `Traits` says."""
    for field in fields(Traits):
        if field.name in traits and type(traits[field.name]) is not field.type:
            raise InputError(
                f"{source} says {field.name}={traits[field.name]!r}, expected {IN_WORDS[field.type]}; "  # type: ignore[index]
                "mend it, or set model.name to another model"
            )
    return traits


def read_dense_layers(source: str) -> list[Dense]:
    """Return the layers behind the pooling; raises InputError for those we do not have."""
    return [read_dense(source, path) for kind, path in _modules(source) if kind == "Dense"]


def write_description(folder: Path, traits: Traits, width: int, num_dense: int) -> None:
    """Write all but the weights; makes the folders of `num_dense` layers, which `dense_folder` names."""
    max_tokens = max(traits.max_query_tokens, traits.max_passage_tokens)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    _write_settings(folder, traits)
    is_latent = traits.pooling == "latent"
    modules = [
        ("", "Transformer"),
        (LATENT_FOLDER, LATENT_TYPE) if is_latent else (POOLING_FOLDER, "Pooling"),
        *((dense_folder(i), "Dense") for i in range(num_dense)),
        *[(f"{2 + num_dense}_Normalize", "Normalize")] * traits.normalize,
    ]
    for path, _ in modules:
        (folder / path).mkdir(exist_ok=True)
    if not is_latent:
        pooling = {"word_embedding_dimension": width, "pooling_mode": POOLING_NAMES[traits.pooling]}
        _write(folder / POOLING_FOLDER / "config.json", pooling)
    types = [kind if "." in kind else f"sentence_transformers.models.{kind}" for _, kind in modules]
    entries = [{"idx": i, "name": str(i), "path": path, "type": types[i]} for i, (path, _) in enumerate(modules)]
    _write(folder / "modules.json", entries)


def write_router(folder: Path, traits: Traits) -> None:
    """Write what joins two towers, each written in its folder before."""
    types: dict[str, str] = {}
    structure: dict[str, list[str]] = {}
    for tower in TOWER_FOLDERS:
        for entry in json.loads((folder / tower / "modules.json").read_text()):
            path = f"{tower}/{entry['path']}".rstrip("/")
            types[path] = entry["type"]
            structure.setdefault(tower, []).append(path)
    parameters = {"default_route": "document", "allow_empty_key": True, "route_mappings": {}}
    _write(folder / ROUTER, {"types": types, "structure": structure, "parameters": parameters})
    _write(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}])
    _write_settings(folder, traits)


def tower_folders(source: str) -> list[str]:
    """Return the folders of the towers for queries and for passages, nothing for a model of one; raises InputError."""
    if not read_json(source, ROUTER):
        return []
    folders = [Path(source) / name for name in TOWER_FOLDERS]
    if not all((folder / "config.json").is_file() for folder in folders):
        raise InputError(
            f"{source} has routes, but not a whole model in each of the folders {' and '.join(TOWER_FOLDERS)}; "
            "save it with negpool, or set model.name to another"
        )
    return [str(folder) for folder in folders]


def dense_folder(number: int) -> str:
    """Return the name of a layer's folder."""
    return f"{2 + number}_Dense"


def not_expressed(traits: Traits, has_two_towers: bool) -> Iterator[str]:
    """Yield a clause for each trait that others have no words for."""
    if has_two_towers:
        yield f"AutoModel loads one tower at a time, from the folders {' and '.join(TOWER_FOLDERS)}"
    if traits.pooling == "latent":
        yield "SentenceTransformer reads latent pooling only with trust_remote_code=True where negpool is installed"
    if traits.max_query_tokens != traits.max_passage_tokens:
        yield (
            f"SentenceTransformer cuts queries and passages alike, at {max(traits.max_query_tokens, traits.max_passage_tokens)} "
            f"tokens, not at {traits.max_query_tokens} and {traits.max_passage_tokens}"
        )


def _pooling(source: str) -> str | None:
    """Return our name of a folder's pooling, None if it has none."""
    kinds = dict(_modules(source))
    if "LatentPooling" in kinds:
        return "latent"
    config = read_json(source, f"{kinds.get('Pooling', POOLING_FOLDER)}/config.json")
    named = config.get("pooling_mode")
    flags = [flag for flag in config if flag.startswith("pooling_mode_") and config[flag] is True]
    if named is None and not flags:
        return None
    theirs = {POOLING_NAMES[ours]: ours for ours in POOLING_NAMES} | {f"pooling_mode_{OLD_FLAGS[n]}": n for n in OLD_FLAGS}
    found = theirs.get(named) if isinstance(named, str) else theirs.get(flags[0]) if len(flags) == 1 else None
    if found is None:
        raise InputError(
            f"{source} uses pooling {named or ' and '.join(flags)}, expected one of {', '.join(POOLING_NAMES)}; "
            "set model.pooling to train with another"
        )
    return found


def _modules(source: str) -> list[tuple[str, str]]:
    """Return the kind and folder of each module."""
    entries = read_json(source, "modules.json", list)
    if not all(isinstance(entry, dict) and {str} == {type(entry.get("type")), type(entry.get("path"))} for entry in entries):
        raise InputError(f"{source}/modules.json is no list of modules with type and path; set model.name to a whole model")
    return [(entry["type"].rpartition(".")[2], entry["path"]) for entry in entries]


def _write_settings(folder: Path, traits: Traits) -> None:
    prompts = {"query": traits.query_prefix, "document": traits.passage_prefix}
    similarity = "cosine" if traits.normalize else "dot"
    _write(folder / "config_sentence_transformers.json", {"prompts": prompts, "similarity_fn_name": similarity})


def _write(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
