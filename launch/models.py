"""Models that are there already: evaluate one, search with one, filter data by one, merge several."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from launch.named import BM25, Reading, as_it_is, locate_model, model_folder
from launch.output import start_logging, told_progress
from launch.srun import world_of_trainers
from mining.show import rows_of
from trainer.data.datasets import RetrievalData
from trainer.data.filter import find_consistent, refuse_full, write_filtered
from trainer.encoder.auto import encode_on
from trainer.encoder.device import choose_device
from trainer.encoder.encode import DTYPES, encode_rows
from trainer.encoder.missing import Texts, encode_missing
from trainer.encoder.model import load_encoder, weights_digest
from trainer.encoder.settings import ModelSettings
from trainer.encoder.shards import DEFAULTS, Shards, open_shards, prune_shards
from trainer.encoder.tokens import tokenize_side, tokenize_texts
from trainer.encoder.topk import merge_top_k, top_k
from trainer.errors import InputError
from trainer.evaluate import FOUND, evaluate, means, measure_each, without_own
from trainer.handoff.pins import Pins

if TYPE_CHECKING:
    from trainer.world import World

EXCERPT_LINES = 3
KEEP_CACHED = 16  # sets of embeddings that stay, youngest first: those of eight models that are evaluated in turn


def evaluate_named(model: str, reading: Reading, split: str) -> dict[str, float] | None:
    """Return the measures of a model, or of "bm25", on a split; None on ranks that do not speak. Collective."""
    rank = start_as_rank()
    if model == BM25:
        refuse_encoding(reading)
        return evaluate_bm25(reading.open_data(), split) if rank == 0 else None
    return evaluate_model(model, reading, split, join_for)


def start_as_rank() -> int:
    """Take this process's place among those of its launcher, send messages to standard error, and return its rank."""
    os.environ.update(world_of_trainers(os.environ))
    rank = int(os.environ.get("RANK", "0"))
    start_logging(rank)
    return rank


def refuse_encoding(reading: Reading) -> None:
    """Raise InputError for settings that BM25 has no use for."""
    if (reading.model, reading.encode) != (ModelSettings(), DEFAULTS):
        raise InputError("bm25 compares words and encodes nothing: settings of model and encode have no effect on it")


def evaluate_model(model: str, reading: Reading, split: str, join: Callable[[Reading], "World"]) -> dict[str, float] | None:
    """Return the measures of a model on a split; None on ranks that do not speak. Collective over the world that is joined."""
    data = reading.open_data()
    folder, shards_root = locate_model(model, data.cache)
    world = join(reading)
    encoder, tokenizer, traits = load_encoder(as_it_is(reading.model, folder))
    encoder.to(world.device)
    parts = world, data, split, encoder, tokenizer, traits, shards_root
    with told_progress("encoding", world.speaks) as on_progress:
        measures = evaluate(*parts, encode=reading.encode, on_progress=on_progress)
    world.leave()
    if world.speaks:
        prune_shards(shards_root, KEEP_CACHED)
    return measures if world.speaks else None


def join_for(reading: Reading) -> "World":
    """Join the ranks of the launcher, on the device that is asked for."""
    from trainer.world import join_world

    world = join_world()
    if reading.encode.device is None:
        return world
    return replace(world, device=choose_device(reading.encode.device, world.device.index or 0))


def evaluate_bm25(data: RetrievalData, split: str) -> dict[str, float]:
    """Return the measures of BM25 on a split."""
    return means(bm25_of_each(data, split))


def bm25_of_each(data: RetrievalData, split: str) -> np.ndarray:
    """Return what BM25's list measures for each query of a split, as `measure_each` has it."""
    from mining.find.bm25 import bm25_top_k

    query_rows = data.evaluated_queries(split)
    scores, ids = without_own(data, split, query_rows, *bm25_top_k(data, query_rows, FOUND))
    return measure_each(data, split, query_rows, scores, ids)


def search_corpus(model: str, reading: Reading, question: str | None, query_id: str | None, top: int) -> dict[str, Any]:
    """Return a question, in words or a query of the data set, and the `top` passages that a model finds for it, best first.

    The corpus is encoded once and kept; a run's own model finds what the run's evaluation has encoded.
    """
    device = choose_device(reading.encode.device)
    data = reading.open_data()
    row = None if query_id is None else rows_of(data, query_id)[0]
    own = -1 if row is None else own_document(data, row)
    folder, shards_root = locate_model(model, data.cache)
    encoder, tokenizer, traits = load_encoder(as_it_is(reading.model, folder))
    encoder.to(device)
    if row is None:
        text = datasets.Dataset.from_dict({"_id": ["question"], "text": [question]})
        asked, about = tokenize_texts(text, "query", tokenizer, traits, reading.data.cache), {"query": question}
    else:
        asked, about = (
            tokenize_side(data, "queries", tokenizer, traits),
            {"query_id": data.queries[row]["_id"], "query": data.queries[row]["text"]},
        )
    dtype = DTYPES[encode_on(reading.encode, device).dtype]
    query_1D = encode_rows(encoder.side("query"), asked, np.array([row or 0]), dtype=dtype)
    tokens, digest = tokenize_side(data, "corpus", tokenizer, traits), weights_digest(encoder)
    with Pins() as pins:
        shards = open_shards(shards_root, digest, traits.pooling, tokens, encoder, "passage", reading.encode, pins)
        with told_progress("encoding") as on_progress:
            encode_missing([Texts(shards, encoder.side("passage"), tokens)], on_progress)
        scores, ids = _nearest(query_1D, shards, top + (own >= 0))
    prune_shards(shards_root, KEEP_CACHED)
    found = [(data.corpus[row], score) for row, score in zip(ids.tolist(), scores.tolist(), strict=True) if row != own]
    hits = [
        {"id": text["_id"], "score": round(score, 4), "title": _title(text), "excerpt": _excerpt(text["text"])}
        for text, score in found[:top]
    ]
    return {**about, "results": hits}


def _nearest(query_1D: np.ndarray, shards: Shards, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and rows of the best of all shards, (k,) or fewer where there are no more."""
    k = min(k, shards.num_rows)
    found = [top_k(query_1D, shards.read(s), k, first_id=int(shards.rows(s)[0])) for s in range(shards.num_shards)]
    scores, ids = merge_top_k(found, k)
    return scores[0], ids[0]


def own_document(data: RetrievalData, query_row: int) -> int:
    """Return the row of the document that is not found for a query, as it has its id and is not judged relevant; -1: none."""
    own = int(data.own_rows[query_row])
    judged = [q.corpus_rows[(q.query_rows == query_row) & (q.scores > 0)] for q in data.qrels.values()]
    return -1 if any(own in rows for rows in judged) else own


def _title(text: dict[str, Any]) -> str:
    return text["text"][: text["title_length"] or 0]


def _excerpt(text: str) -> str:
    return "\n".join(text.splitlines()[:EXCERPT_LINES])


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


def filter_data(model: str, reading: Reading, out: Path, *, split: str, top_k: int, pool: int, seed: int) -> dict[str, int]:
    """Write a data set without the training pairs that a model does not find again; return how many there were and stay."""
    refuse_full(out)
    device = choose_device(reading.encode.device)
    data = reading.open_data()
    folder, shards_root = locate_model(model, data.cache)
    encoder, tokenizer, traits = load_encoder(as_it_is(reading.model, folder))
    encoder.to(device)
    rules = {"k": top_k, "pool": pool, "seed": seed}
    found = find_consistent(data, split, encoder, tokenizer, traits, shards_root, encode=reading.encode, **rules)
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
