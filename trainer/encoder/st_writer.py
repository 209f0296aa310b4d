"""Writes how sentence-transformers is to use a model: all but the weights, so that it and `mteb` load our folders as they are."""

import json
from collections.abc import Iterator
from pathlib import Path

from trainer.encoder.pooling import MODES
from trainer.encoder.recorded import ST_FILE
from trainer.encoder.settings import Traits
from trainer.encoder.st_modules import LATENT_TYPE, POOLING_FOLDER, ROUTER
from trainer.encoder.tensors import write_json

LATENT_FOLDER = "1_LatentAttention"
TOWER_FOLDERS = ("query", "document")  # each a whole model, named as sentence-transformers names the tasks
TYPE = "sentence_transformers.models."  # every version has its modules there


def write_description(folder: Path, traits: Traits, width: int, layers: list[str]) -> None:
    """Write a model's modules and settings; width: of a state. Makes the folders of the layers, which `layer_folder` names.

    layers: the kinds of the layers behind the pooling.
    """
    max_tokens = max(traits.max_query_tokens, traits.max_passage_tokens)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    _write_settings(folder, traits)
    is_latent = traits.pooling == "latent"
    modules = [
        ("", "Transformer"),
        (LATENT_FOLDER, LATENT_TYPE) if is_latent else (POOLING_FOLDER, "Pooling"),
        *((layer_folder(i, kind), kind) for i, kind in enumerate(layers)),
        *[(layer_folder(len(layers), "Normalize"), "Normalize")] * traits.normalize,
    ]
    for path, _ in modules:
        (folder / path).mkdir(exist_ok=True)
    if not is_latent:
        modes = [MODES[name][0] for name in traits.pooling.split("+")]
        pooling = {"word_embedding_dimension": width, "pooling_mode": modes[0] if len(modes) == 1 else modes}
        write_json(folder / POOLING_FOLDER / "config.json", pooling | {"include_prompt": traits.include_prompt})
    types = [kind if "." in kind else f"{TYPE}{kind}" for _, kind in modules]
    entries = [{"idx": i, "name": str(i), "path": path, "type": types[i]} for i, (path, _) in enumerate(modules)]
    write_json(folder / "modules.json", entries)


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
    write_json(folder / ROUTER, {"types": types, "structure": structure, "parameters": parameters})
    write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": f"{TYPE}Router"}])
    _write_settings(folder, traits)


def layer_folder(number: int, kind: str) -> str:
    """Return the name of a layer's folder."""
    return f"{2 + number}_{kind}"


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


def _write_settings(folder: Path, traits: Traits) -> None:
    prompts = {"query": traits.query_prefix, "document": traits.passage_prefix}
    similarity = "cosine" if traits.normalize else "dot"
    cut = {} if traits.width is None else {"truncate_dim": traits.width}
    write_json(folder / ST_FILE, {"prompts": prompts, "similarity_fn_name": similarity, **cut})
