"""`negpool bench mining`: encoding, exact search and a refresh against the bare work in them, two ranks against one, an idle
miner, an approximate index against exact search, memory against plan.

Everybody has a turn in every round, and ratios are medians of the rounds' ratios, because the machine is not the same from
minute to minute. Bare encoding is the encoder called on the batches that we would make, made in advance; bare search is
the product in our tiles, kept nowhere. The peer encodes the same texts with the same weights, and its embeddings are
compared with ours.
"""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from launch.bench.bare import batches_of, forward
from launch.bench.embedded import embed_data
from launch.bench.exact_search import SearchSize, measure_search
from launch.bench.flops import forward_flops
from launch.bench.idle import measure_idle
from launch.bench.machine import describe, matmul_rate
from launch.bench.made_texts import data_of
from launch.bench.mining_ranks import prepare_service
from launch.bench.peer import open_peer
from launch.bench.recall import Searched, made_embeddings, measure_index
from launch.bench.shapes import model_of
from launch.bench.step import PEER, precision_of
from launch.bench.turns import Turns, share_of_rate, speeds, take_turns
from launch.bench.whole_refresh import Corpus, measure_refresh, write_part
from launch.counted import counted
from launch.output import messages
from launch.ranks import on_ranks
from mining.find.cost import FEWEST_LISTS
from mining.find.index import POINTS_PER_LIST
from mining.find.rates import clustered, overlapping
from trainer.data.datasets import open_dataset
from trainer.encoder.encode import DTYPES, encode_rows
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.source import resolve_model
from trainer.encoder.tokens import tokenize
from trainer.errors import InputError
from trainer.world import World, stay_alone

WANTED: dict[str, Any] = {
    "encoding": {"bare model": 0.95, "sentence-transformers": 1.15},
    "search": {"bare product": 0.7},
    "ranks": {"encode": 1.8, "search": 1.8},
    "refresh": 1.10,
    "index": 0.35,
    "memory": [0.9, 1.1],
    "idle": 1.02,
}
RANKS = {"num_texts": 768, "max_tokens": 64, "num_queries": 4096, "num_passages": 131072}  # some seconds of work for two
SEARCH = SearchSize()
INDEX_QUERIES, INDEX_WIDTH = 10_000, 384
FEWEST_INDEXED = POINTS_PER_LIST * FEWEST_LISTS
EQUAL = {"fp32": 1e-5, "bf16": 2e-2}  # largest difference of two embeddings of one text
PEER_ROWS = {"cpu": (16, 32, 64), "cuda": (32, 128, 512)}  # of a batch of the peer's, whose own default is 32


@dataclass(frozen=True, kw_only=True)
class MiningSizes:
    """How much is measured."""

    texts: int = 128  # that are encoded
    max_tokens: int = 256  # of a text
    rounds: int = 3
    refreshed: int = 1500  # passages of a whole refresh, with their training queries
    indexed: int = 0  # passages of an approximate index; 0: none is measured
    passages: int = 0  # of the service whose memory is measured; 0: none is


def bench_mining(data: str, model: str, sizes: MiningSizes, half: bool | None, peer: bool) -> dict[str, Any]:
    """Return the figures, each with the wanted one.

    half: encode in bfloat16, everybody; None: on a GPU.
    """
    if 0 < sizes.indexed < FEWEST_INDEXED:
        raise InputError(f"--index-passages {sizes.indexed} is too few for an index of lists; set it to {FEWEST_INDEXED} or more")
    world = stay_alone(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
    path, model, precision = data_of(data), model_of(model), precision_of(half, world.device)
    found = {**describe(world.device), "rounds": sizes.rounds}
    found["encoding"] = measure_encoding(path, model, sizes, world, precision, peer)
    found["search"] = measure_search(SEARCH, world, sizes.rounds, WANTED["search"])
    messages().print("[dim]a whole refresh against its bare parts[/dim]")
    found["refresh"] = _refresh(path, model, sizes, world, precision)
    messages().print("[dim]two ranks of one thread against one[/dim]")
    told = {"data": str(path), "model": model, "rounds": sizes.rounds, **RANKS}
    ranks = on_ranks("launch.bench.mining_ranks", 2, mpi=True, what="ranks", **told)
    found["ranks"] = {**ranks, **RANKS, "wanted": WANTED["ranks"]}
    messages().print("[dim]steps of a trainer, with and without an idle miner[/dim]")
    found["idle"] = {**measure_idle(path, model, sizes.rounds), "wanted": WANTED["idle"]}
    if sizes.indexed:
        found["index"] = _indexes(path, model, sizes, world.device)
    if sizes.passages:
        messages().print(f"[dim]a service with {counted(sizes.passages, 'passage')}: some minutes[/dim]")
        found["memory"] = {**_memory(model, sizes.passages), "wanted": WANTED["memory"]}
    return found


def _refresh(path: Path, model: str, sizes: MiningSizes, world: World, precision: Literal["fp32", "bf16"]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        write_part(path, sizes.refreshed, Path(name) / "data")
        corpus = Corpus(Path(name), model, sizes.max_tokens, precision)
        return {**measure_refresh(corpus, sizes.rounds, world), "precision": precision, "wanted": WANTED["refresh"]}


def _indexes(path: Path, model: str, sizes: MiningSizes, device: torch.device) -> dict[str, Any]:
    found, embedded = {}, embed_data(path, model, sizes.max_tokens, INDEX_QUERIES, sizes.indexed)
    if len(embedded[1]) >= FEWEST_INDEXED:
        found[f"embeddings of {path.name}"] = measure_index(Searched(*embedded, device))
    ways = {"in clusters": (clustered, WANTED["index"]), "in overlapping clusters": (overlapping, None)}
    for name, (make, wanted) in ways.items():
        made = made_embeddings(make, INDEX_QUERIES, sizes.indexed, INDEX_WIDTH)
        found[f"made, {name}, shuffled"] = measure_index(Searched(*made, device), wanted)
    return found


def _memory(model: str, passages: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        prepare_service(Path(folder), model, passages)
        found = on_ranks("launch.bench.mining_ranks", 1, mpi=True, what="memory", folder=folder)
        return {"passages": passages, **found}


def measure_encoding(path: Path, model: str, sizes: MiningSizes, world: World, precision: str, peer: bool) -> dict[str, Any]:
    """Return what encoding takes the bare model, us and the peer, which is at its best; all that it was tried with is told."""
    device, dtype, num_texts, max_tokens = world.device, DTYPES[precision], sizes.texts, sizes.max_tokens
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=model, max_passage_tokens=max_tokens))
    encoder.eval().to(device)
    corpus = open_dataset(path, None).corpus
    if len(corpus) < num_texts:
        raise InputError(f"{path} has {counted(len(corpus), 'document')}, fewer than {num_texts}; lower --texts")
    texts = corpus.select(np.linspace(0, len(corpus) - 1, num_texts).astype(int).tolist())
    tokens = tokenize(texts, tokenizer, prefix="", max_tokens=max_tokens)
    rows = np.arange(num_texts)
    batches = batches_of(tokens, encoder, dtype)
    ways: dict[str, Callable[[], object]] = {
        "bare model": lambda: forward(encoder, batches, dtype),
        "ours": lambda: encode_rows(encoder, tokens, rows, dtype=dtype),
    }
    found: dict[str, Any] = {"texts": num_texts, "tokens": int(tokens.lengths.sum()), "max_tokens": max_tokens}
    if peer:
        theirs, words = _peer(model, max_tokens, device, dtype, encoder.normalize), list(texts["text"])
        difference = np.abs(theirs(words, PEER_ROWS["cpu"][0]) - encode_rows(encoder, tokens, rows, dtype=dtype)).max()
        found["largest_difference"] = float(difference)
        if not difference <= EQUAL[precision]:
            raise RuntimeError(f"the peer's embeddings differ by {difference:.1e}: not the same work")
        ways |= {f"{PEER}, {n} a batch": functools.partial(theirs, words, n) for n in PEER_ROWS[device.type]}
    every = take_turns(ways, sizes.rounds, world)
    if peer:
        found["peer_trials"] = {name: round(of.median_s, 4) for name, of in every.items() if name.startswith(PEER)}
    turns = _with_best_peer(every)
    flops, rate = forward_flops(encoder, tokens.lengths), matmul_rate(device, dtype)
    found |= speeds(turns, WANTED["encoding"], found["tokens"], "tokens_per_s")
    return found | share_of_rate(flops / turns["ours"].median_s, rate, precision)


def _with_best_peer(turns: dict[str, Turns]) -> dict[str, Turns]:
    """Return the turns with one row of the peer, that of its fastest batch."""
    theirs = {name: found for name, found in turns.items() if name.startswith(PEER)}
    others = {name: found for name, found in turns.items() if name not in theirs}
    return others | ({PEER: min(theirs.values(), key=lambda found: found.median_s)} if theirs else {})


def _peer(
    model: str, max_tokens: int, device: torch.device, dtype: torch.dtype, normalize: bool
) -> Callable[[list[str], int], np.ndarray]:
    """Return sentence-transformers' way from texts to embeddings, in batches of so many."""
    theirs = open_peer(resolve_model(model), device, dtype)
    theirs.max_seq_length = max_tokens

    def encode(words: list[str], rows: int) -> np.ndarray:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = theirs.encode(words, batch_size=rows, normalize_embeddings=normalize, convert_to_numpy=False)
        return torch.stack(list(found)).float().cpu().numpy()

    return encode
