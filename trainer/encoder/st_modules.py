"""Which modules a sentence-transformers folder is made of, in their order; what cannot be trained here is refused by name.

A router (`Router`, in old folders `Asym`) makes two chains of modules, one for queries and one for passages.
"""

import os
from pathlib import Path
from typing import NamedTuple

from trainer.encoder.layers import LAYERS
from trainer.encoder.source import read_json
from trainer.errors import InputError

ROUTER, POOLING_FOLDER, LATENT_TYPE = "router_config.json", "1_Pooling", "trainer.encoder.latent.LatentPooling"
ROUTERS = ("Router", "Asym")
POOLINGS_OF_OTHERS = ("Pooling", "LatentPooling")
# Names of routes, by side
ROUTES = {"query": ("query",), "passage": ("document", "passage", "doc", "corpus")}
SPARSE, TOKENS = "it gives sparse vectors", "it gives a vector for every token, as ColBERT does"
STATIC = "it looks vectors of words up, without a transformer"
WHAT_IT_IS = {
    **dict.fromkeys(
        ("SpladePooling", "MLMTransformer", "SparseStaticEmbedding", "SparseAutoEncoder", "CSRSparsity", "IDF"), SPARSE
    ),
    **dict.fromkeys(("MultiVectorMask", "TokenPooling", "LateInteraction"), TOKENS),
    **dict.fromkeys(("StaticEmbedding", "WordEmbeddings", "BoW", "WordWeights"), STATIC),
    **dict.fromkeys(("CNN", "LSTM"), "it reads vectors of words, without a transformer"),
    "WeightedLayerPooling": "it averages the transformer's layers with weights of its own",
    "CLIPModel": "it reads images",
}
# `model_type` of config_sentence_transformers.json
WHAT_MODELS_ARE = {
    "SparseEncoder": SPARSE,
    "CrossEncoder": "it scores pairs of texts",
    "MultiVectorEncoder": TOKENS,
    "ColBERT": TOKENS,
}
SINGLE = "and negpool trains a transformer that gives one vector a text; set model.name to another model"


class Module(NamedTuple):
    """One module of a folder."""

    kind: str  # the last part of its type
    path: str  # its folder in the model's

    def below(self, folder: str) -> "Module":
        """Return the module of a folder within a folder."""
        return Module(self.kind, os.path.join(folder, self.path) if self.path else folder)


def chains_of(source: str) -> list[list[Module]]:
    """Return the modules of a folder: one chain, or one for queries and one for passages; raises InputError."""
    _refuse_others(source)
    chains = _expanded(source, _entries(source))
    for chain in chains:
        _check(source, chain)
    return chains[:1] if chains[0] == chains[-1] else chains


def _entries(source: str) -> list[Module]:
    """Return the modules that modules.json names, or those of a folder that has no such file."""
    if not (Path(source) / "modules.json").is_file():
        pooling = [Module("Pooling", POOLING_FOLDER)] * (Path(source) / POOLING_FOLDER / "config.json").is_file()
        return [Module("Router", "")] if (Path(source) / ROUTER).is_file() else [Module("Transformer", ""), *pooling]
    entries = read_json(source, "modules.json", list)
    is_list = all(isinstance(entry, dict) and {str} == {type(entry.get("type")), type(entry.get("path"))} for entry in entries)
    if not entries or not is_list:
        raise InputError(f"{source}/modules.json is no list of modules with type and path; set model.name to a whole model")
    return [_module(source, entry["type"], entry["path"]) for entry in entries]


def _module(source: str, kind: str, path: str) -> Module:
    """Return a module by the name of its class; raises InputError for an unknown class and for a path that leads out of the
    folder.
    """
    if os.path.isabs(path) or ".." in Path(path).parts:
        raise InputError(f"{source} has a module at {path}, outside of the folder; set model.name to a whole model")
    name = kind.rpartition(".")[2]
    if kind.startswith("pylate."):
        raise InputError(f"{source} has the module {kind}: {TOKENS}, {SINGLE}")
    if not kind.startswith("sentence_transformers.") and kind != LATENT_TYPE:
        raise InputError(
            f"{source} has the module {kind}, code of its own, which negpool never runs; set model.name to a model that "
            "sentence-transformers loads without trust_remote_code"
        )
    return Module(name, path)


def _expanded(source: str, entries: list[Module]) -> list[list[Module]]:
    """Return the chains for queries and for passages, alike without a router."""
    chains: tuple[list[Module], list[Module]] = [], []
    for entry in entries:
        routes = _routes(source, entry) if entry.kind in ROUTERS else ([entry], [entry])
        for chain, route in zip(chains, routes, strict=True):
            chain += route
    return list(chains)


def _routes(source: str, router: Module) -> tuple[list[Module], list[Module]]:
    """Return what a router does with queries, and with passages; raises InputError for routes of other names."""
    folder = Path(router.path)
    config = read_json(source, str(folder / ROUTER)) or read_json(source, str(folder / "config.json"))
    structure, types = config.get("structure"), config.get("types")
    if not isinstance(structure, dict) or not isinstance(types, dict):
        raise InputError(f"{source} has a {router.kind} without structure and types; set model.name to a whole model")
    found = [[structure[name] for name in names if name in structure] for names in ROUTES.values()]
    if [len(routes) for routes in found] != [1, 1] or len(structure) != 2 or config.get("parameters", {}).get("route_mappings"):
        raise InputError(
            f"{source} has routes for {', '.join(structure)}, expected one for query and one for document, without "
            "route_mappings; set model.name to another model"
        )
    query, passage = ([_module(source, types[name], name).below(router.path) for name in routes[0]] for routes in found)
    return query, passage


def _check(source: str, chain: list[Module]) -> None:
    """Raise InputError for a chain that is not: a transformer, one pooling, layers behind it."""
    kinds = [module.kind for module in chain]
    for module in chain:
        if module.kind in WHAT_IT_IS:
            raise InputError(f"{source} has the module {module.kind}: {WHAT_IT_IS[module.kind]}, {SINGLE}")
        if module.kind not in ("Transformer", *POOLINGS_OF_OTHERS, *LAYERS):
            raise InputError(
                f"{source} has the module {module.kind}, which negpool does not know, expected Transformer, Pooling, "
                f"{', '.join(LAYERS)}; set model.name to another model"
            )
    if len(kinds) > 1 and not set(kinds) & set(POOLINGS_OF_OTHERS):
        raise InputError(f"{source} has {' and '.join(kinds)} without a pooling: {TOKENS}, {SINGLE}")
    if kinds[0] != "Transformer" or "Transformer" in kinds[1:] or (len(kinds) > 1 and kinds[1] not in POOLINGS_OF_OTHERS):
        raise InputError(
            f"{source} has the modules {', '.join(kinds)}, expected a Transformer, then a Pooling, then layers behind it; "
            "set model.name to another model"
        )
    if not any((Path(source) / chain[0].path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"{source} has no whole model in the folder {chain[0].path or source}; set model.name to a whole model")
    if sum(kind in POOLINGS_OF_OTHERS for kind in kinds) > 1:
        raise InputError(f"{source} has two poolings, expected one; set model.name to another model")


def _refuse_others(source: str) -> None:
    """Raise InputError for a folder of which a file says that it is another sort of model."""
    kind = read_json(source, "config_sentence_transformers.json").get("model_type")
    if kind in WHAT_MODELS_ARE:
        raise InputError(f"{source} is a {kind}: {WHAT_MODELS_ARE[kind]}, {SINGLE}")
    if kind not in (None, "SentenceTransformer"):
        raise InputError(f"{source} is a {kind}, which negpool does not know, {SINGLE}")
    config = read_json(source, "config.json")
    architectures = config.get("architectures") or []
    of_pairs = "sbert_ce_default_activation_function" in config or "sentence_transformers" in config
    of_pairs |= any(str(name).endswith("ForSequenceClassification") for name in architectures)
    if of_pairs and not (Path(source) / "modules.json").is_file():
        raise InputError(f"{source} is a cross-encoder ({', '.join(architectures)}): {WHAT_MODELS_ARE['CrossEncoder']}, {SINGLE}")
    if any("colbert" in str(name).lower() for name in architectures) or (Path(source) / "artifact.metadata").is_file():
        raise InputError(f"{source} is a ColBERT: {TOKENS}, {SINGLE}")
    if config.get("model_type") == "model2vec" or "StaticModel" in architectures:
        raise InputError(f"{source} is a model2vec model: {STATIC}, {SINGLE}")
