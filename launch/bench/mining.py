"""`negpool bench mining`: encoding and exact search against the bare work in them, two ranks against one, an idle miner,
memory against plan.

Everybody has a turn in every round, and ratios are medians of the rounds' ratios, because the machine is not the same from
minute to minute. Bare encoding is the encoder called on the batches that we would make, made in advance; bare search is
the product in our tiles, kept nowhere. The peer encodes the same texts with the same weights, and its embeddings are
compared with ours.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.bench.bare import batches_of, forward
from launch.bench.idle import measure_idle
from launch.bench.machine import describe, matmul_rate, tiled_product
from launch.bench.made_texts import data_of
from launch.bench.mining_ranks import prepare_service
from launch.bench.peer import open_peer
from launch.bench.shapes import model_of
from launch.bench.step import PEER, forward_flops, precision_of
from launch.bench.turns import Turns, compared, take_turns
from launch.counted import counted
from launch.output import messages
from launch.ranks import on_ranks
from trainer.data.datasets import open_dataset
from trainer.encoder.encode import DTYPES, encode_rows
from trainer.encoder.model import ModelSettings, load_encoder
from trainer.encoder.source import resolve_model
from trainer.encoder.tokens import tokenize
from trainer.encoder.topk import BestOf, tile_shape
from trainer.errors import InputError
from trainer.world import World, stay_alone

WANTED: dict[str, Any] = {
    "encoding": {"bare model": 0.95, "sentence-transformers": 1.15},
    "search": {"bare product": 0.7},
    "ranks": {"encode": 1.8, "search": 1.8},
    "memory": [0.9, 1.1],
    "idle": 1.02,
}
RANKS = {"num_texts": 768, "max_tokens": 64, "num_queries": 4096, "num_passages": 131072}  # some seconds of work for two
SEARCH_QUERIES, SEARCH_PASSAGES, SEARCH_WIDTH, TOP_K = 2048, 131072, 384, 200
EQUAL = {"fp32": 1e-5, "bf16": 2e-2}  # largest difference of two embeddings of one text
PEER_ROWS = {"cpu": (32,), "cuda": (32, 128, 512)}  # of a batch of the peer's, whose own default is 32


def bench_mining(
    data: str, model: str, texts: int, max_tokens: int, rounds: int, passages: int, half: bool | None, peer: bool
) -> dict[str, Any]:
    """Return the figures, each with the wanted one.

    texts: that are encoded; passages: of the corpus whose memory is measured, 0: none is. half: encode in bfloat16, everybody;
    None: on a GPU.
    """
    world = stay_alone(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
    data, model, precision = str(data_of(data)), model_of(model), precision_of(half, world.device)
    encoding = _encoding(Path(data), model, texts, max_tokens, rounds, world, precision, peer)
    search = measure_search(world, rounds)
    messages().print("[dim]two ranks of one thread against one[/dim]")
    ranks = on_ranks("launch.bench.mining_ranks", 2, mpi=True, what="ranks", data=data, model=model, rounds=rounds, **RANKS)
    ranks |= {**RANKS, "wanted": WANTED["ranks"]}
    messages().print("[dim]steps of a trainer, with and without an idle miner[/dim]")
    idle = {**measure_idle(Path(data), model, rounds), "wanted": WANTED["idle"]}
    about = {**describe(world.device), "rounds": rounds}
    found = {**about, "encoding": encoding, "search": search, "ranks": ranks, "idle": idle}
    if passages:
        messages().print(f"[dim]a service with {counted(passages, 'passage')}: some minutes[/dim]")
        with tempfile.TemporaryDirectory() as folder:
            prepare_service(Path(folder), model, passages)
            memory = on_ranks("launch.bench.mining_ranks", 1, mpi=True, what="memory", folder=folder)
            found["memory"] = {"passages": passages, **memory, "wanted": WANTED["memory"]}
    return found


def _encoding(
    path: Path, model: str, num_texts: int, max_tokens: int, rounds: int, world: World, precision: str, peer: bool
) -> dict[str, Any]:
    device, dtype = world.device, DTYPES[precision]
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
    turns = _with_best_peer(take_turns(ways, rounds, world))
    flops, rate = forward_flops(encoder, tokens.lengths), matmul_rate(device, dtype)
    found |= _speeds(turns, WANTED["encoding"], found["tokens"], "tokens_per_s")
    return found | _share(flops / turns["ours"].median_s, rate, precision)


def _with_best_peer(turns: dict[str, Turns]) -> dict[str, Turns]:
    """Return the turns with one row of the peer, that of its fastest batch."""
    theirs = {name: found for name, found in turns.items() if name.startswith(PEER)}
    others = {name: found for name, found in turns.items() if name not in theirs}
    return others | ({PEER: min(theirs.values(), key=lambda found: found.median_s)} if theirs else {})


def _share(flops_per_s: float, rate: float, precision: str) -> dict[str, Any]:
    return {
        "precision": precision,
        "matmul_gflops": round(rate / 1e9, 1),
        "share_of_matmul_rate": round(flops_per_s / rate, 3),
    }


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


def measure_search(world: World, rounds: int) -> dict[str, Any]:
    """Return what exact search takes, against the product in its tiles."""
    device = world.device
    query_QD, passage_ND = (unit(n, SEARCH_WIDTH) for n in (SEARCH_QUERIES, SEARCH_PASSAGES))
    rows_n = np.arange(SEARCH_PASSAGES)

    def ours() -> None:
        best = BestOf(query_QD, TOP_K, device)
        best.look_at(passage_ND, rows_n)
        best.keys()

    query, passage = torch.from_numpy(query_QD).to(device), torch.from_numpy(passage_ND).to(device)
    tile = tile_shape(TOP_K, device.type)
    ways: dict[str, Callable[[], object]] = {
        "bare product": functools.partial(tiled_product, query, passage, tile),
        "ours": ours,
    }
    flops = 2 * SEARCH_QUERIES * SEARCH_PASSAGES * SEARCH_WIDTH
    found = {"queries": SEARCH_QUERIES, "passages": SEARCH_PASSAGES, "width": SEARCH_WIDTH, "top_k": TOP_K}
    turns = take_turns(ways, rounds, world)
    found |= _speeds(turns, WANTED["search"], flops / 1e9, "gflops")
    return found | _share(flops / turns["ours"].median_s, matmul_rate(device), "fp32")


def unit(num_rows: int, width: int) -> np.ndarray:
    """Return random vectors of length 1, (num_rows, width) float32."""
    vectors = np.random.default_rng(num_rows).standard_normal((num_rows, width), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _speeds(turns: dict[str, Turns], wanted: dict[str, float], work: float, unit_name: str) -> dict[str, Any]:
    """Return everybody's median time and rate, and our rate over theirs, the median of the rounds, beside the wanted one."""
    sides = {
        name: {"seconds": row["seconds"], "ratio": row["ratio"], unit_name: round(work / row["seconds"], 1)}
        for name, row in compared(turns, "ours", {}).items()
    }
    ratios = {name: {"found": sides[name]["ratio"], "wanted": wanted[name]} for name in sides if name in wanted}
    return {"sides": sides, "our_rate_over": ratios}
