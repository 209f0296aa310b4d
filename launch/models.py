"""Models that are there already: evaluate one, search with one, merge several."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.output import start_logging
from launch.srun import world_of_trainers
from trainer.data.datasets import RetrievalData, open_dataset
from trainer.data.filter import find_consistent, refuse_full, write_filtered
from trainer.encoder.encode import encode_rows
from trainer.encoder.missing import Texts, encode_missing
from trainer.encoder.model import ModelSettings, load_encoder, weights_digest
from trainer.encoder.shards import open_shards, prune_shards
from trainer.encoder.source import resolve_model
from trainer.encoder.tokens import tokenize, tokenize_side
from trainer.encoder.topk import merge_top_k, top_k
from trainer.errors import InputError
from trainer.evaluate import FOUND, evaluate, measure, without_own
from trainer.handoff.manifest import NotReadable, TornVersion
from trainer.handoff.pins import Pins
from trainer.handoff.rights import is_writable, unreadable
from trainer.handoff.weights import newest_checkpoint, open_checkpoint

EXCERPT_LINES = 3
KEEP_CACHED = 16  # sets of embeddings that stay, youngest first: those of eight models that are evaluated in turn


def evaluate_model(model: str, data_path: Path, split: str) -> dict[str, float] | None:
    """Return the measures of a model, or of "bm25", on a split; None on ranks that do not speak. Collective."""
    os.environ.update(world_of_trainers(os.environ))
    rank = int(os.environ.get("RANK", "0"))
    start_logging(rank)
    if model == "bm25":
        return evaluate_bm25(open_dataset(data_path), split) if rank == 0 else None
    data = open_dataset(data_path)
    from trainer.world import join_world

    folder, shards_root = locate_model(model, data)
    world = join_world()
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=folder))
    measures = evaluate(world, data, split, encoder.to(world.device), tokenizer, traits, shards_root)
    world.leave()
    if world.speaks:
        prune_shards(shards_root, KEEP_CACHED)
    return measures if world.speaks else None


def evaluate_bm25(data: RetrievalData, split: str) -> dict[str, float]:
    """Return the measures of BM25 on a split."""
    from mining.bm25 import bm25_top_k

    query_rows = data.evaluated_queries(split)
    scores, ids = without_own(data, split, query_rows, *bm25_top_k(data, query_rows, FOUND))
    return measure(data, split, query_rows, scores, ids)


def search_corpus(model: str, data_path: Path, question: str, top: int) -> list[dict[str, Any]]:
    """Return the `top` passages that a model finds for a question, best first, with id, score and excerpt.

    The corpus is encoded once and kept; a run's own model finds what the run's evaluation has encoded.
    """
    if not question.strip():
        raise InputError("there is nothing to search for; give a question in words")
    data = open_dataset(data_path)
    folder, shards_root = locate_model(model, data)
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=folder))
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    tokens, digest, k = tokenize_side(data, "corpus", tokenizer, traits), weights_digest(encoder), min(top, len(data.corpus))
    query_1D = encode_question(encoder.side("query"), tokenizer, traits, question)
    with Pins() as pins:
        shards = open_shards(shards_root, digest, traits.pooling, tokens, encoder, "passage", pins=pins)
        encode_missing([Texts(shards, encoder.side("passage"), tokens)])
        found = [top_k(query_1D, shards.read(s), k, first_id=int(shards.rows(s)[0])) for s in range(shards.num_shards)]
        scores, ids = merge_top_k(found, k)
    prune_shards(shards_root, KEEP_CACHED)
    return [
        {
            "id": data.corpus[int(row)]["_id"],
            "score": round(float(score), 4),
            "excerpt": "\n".join(data.corpus[int(row)]["text"].splitlines()[:EXCERPT_LINES]),
        }
        for score, row in zip(scores[0], ids[0], strict=True)
    ]


def merge_named_models(out: Path, models: list[str], how: str, base: str | None, weights: str | None) -> dict[str, Any]:
    """Write the merge of models, named as elsewhere, and return what went into it; weights: numbers with commas between."""
    from trainer.merge import HOW, merge_models

    if how not in HOW:
        raise InputError(f"--how {how} is unknown; expected {' or '.join(HOW)}")
    try:
        numbers = None if weights is None else [float(number) for number in weights.split(",")]
    except ValueError as error:
        raise InputError(f"--weights {weights} are not numbers with commas between, as in 2,1,1") from error
    return merge_models(out, [model_folder(model) for model in models], how, base and model_folder(base), numbers)


def filter_data(model: str, data_path: Path, out: Path, *, split: str, top_k: int, pool: int, seed: int) -> dict[str, int]:
    """Write a data set without the training pairs that a model does not find again; return how many there were and stay."""
    refuse_full(out)
    data = open_dataset(data_path)
    folder, shards_root = locate_model(model, data)
    encoder, tokenizer, traits = load_encoder(ModelSettings(name=folder))
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    found = find_consistent(data, split, encoder, tokenizer, traits, shards_root, k=top_k, pool=pool, seed=seed)
    prune_shards(shards_root, KEEP_CACHED)
    write_filtered(data, found, out)
    num_kept = int(found.is_kept.sum())
    num_queries = len(np.unique(data.qrels[split].query_rows[found.places[found.is_kept]]))
    return {
        "pairs": len(found.places),
        "kept": num_kept,
        "dropped": len(found.places) - num_kept,
        "queries": len(data.training_queries(split)),
        "queries_kept": num_queries,
        "pool": len(found.pool_rows),
    }


def encode_question(encoder, tokenizer, traits, question: str) -> np.ndarray:
    """Return the (1, D) embedding of one question."""
    from datasets import Dataset

    text = Dataset.from_dict({"_id": ["question"], "text": [question]})
    tokens = tokenize(text, tokenizer, prefix=traits.query_prefix, max_tokens=traits.max_query_tokens)
    return encode_rows(encoder, tokens, np.array([0]))


def locate_model(model: str, data: RetrievalData) -> tuple[str, Path]:
    """Return what load_encoder takes, and the folder of encoded shards to use with it.

    A run folder stands for its newest checkpoint, and a run's shards are used for its models by who may write there.
    """
    folder = model_folder(model)
    path = Path(os.path.expanduser(model))
    parents = Path(os.path.realpath(folder)).parents  # unlike resolve, it follows a circle of links without an error
    run = path if (path / "checkpoints").is_dir() or len(parents) < 3 else parents[2]
    shards = run / "shards"
    is_of_run = (run / "checkpoints").is_dir() and (run == path or shards.is_dir())
    # Another person's run may be read and not written.
    if is_of_run and is_writable(shards if shards.is_dir() else run):
        return folder, shards
    return folder, data.cache / "shards"


def model_folder(model: str) -> str:
    """Return what load_encoder takes: of a run folder its newest whole checkpoint, of a checkpoint its encoder."""
    path = Path(os.path.expanduser(model))
    if (told := unreadable(path)) is not None:
        raise InputError(told)
    if not path.is_dir():
        resolve_model(model)  # a name that leads nowhere is refused before it is looked at as a run or a checkpoint
    if (path / "checkpoints").is_dir():
        passed_over: list[TornVersion] = []
        checkpoint = newest_checkpoint(path, passed_over.append)
        if checkpoint is None:
            raise _without_checkpoint(path, passed_over)
        return str(checkpoint.encoder_folder)
    if (path / "encoder").is_dir() and (path / "manifest.json").is_file():
        try:
            return str(open_checkpoint(path).encoder_folder)
        except NotReadable as told:
            raise InputError(str(told)) from told
        except TornVersion as torn:
            raise InputError(f"the checkpoint {path} is not whole ({torn}); name another one") from torn
    return model


def _without_checkpoint(run: Path, passed_over: list[TornVersion]) -> InputError:
    """Return why no checkpoint of a run is taken: there is none, none is whole, or none may be read."""
    if not passed_over:
        return InputError(f"{run} has no checkpoint yet; wait for one, or name a model folder")
    if isinstance(passed_over[0], NotReadable):
        return InputError(str(passed_over[0]))
    return InputError(f"{run} has no whole checkpoint ({passed_over[0]}); wait for one, or name a model folder")
