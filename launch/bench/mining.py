"""`negpool bench mining`: encoding and exact search against the bare work in them, two ranks against one, an idle miner,
memory against plan.

Everybody has a turn in every round, and ratios are medians of the rounds' ratios, because the machine is not the same from
minute to minute. Bare encoding is the encoder called on the batches that we would make, made in advance; bare search is
the product in our tiles, kept nowhere. The peer encodes the same texts with the same weights, and its embeddings are
compared with ours.
"""

import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradcache.chunks import plan_chunks
from launch.bench.idle import measure_idle
from launch.bench.machine import describe, matmul_rate, seconds_of, tiled_product
from launch.bench.mining_ranks import prepare_service
from launch.counted import counted
from launch.output import messages
from launch.ranks import on_ranks
from trainer.data.datasets import open_dataset
from trainer.encoder.encode import ENCODE_TOKENS, ENCODE_TOKENS_CUDA, encode_rows
from trainer.encoder.model import Encoder, ModelSettings, load_encoder
from trainer.encoder.source import resolve_model
from trainer.encoder.tokens import TokenTable, tokenize
from trainer.encoder.topk import BestOf, tile_shape
from trainer.errors import InputError

WANTED: dict[str, Any] = {
    "encoding": {"bare model": 0.95, "sentence-transformers": 1.15},
    "search": {"bare product": 0.7},
    "ranks": {"encode": 1.8, "search": 1.8},
    "memory": [0.9, 1.1],
    "idle": 1.02,
}
RANKS = {"num_texts": 768, "max_tokens": 64, "num_queries": 4096, "num_passages": 131072}  # some seconds of work for two
SEARCH_QUERIES, SEARCH_PASSAGES, SEARCH_WIDTH, TOP_K = 2048, 131072, 384, 200
EQUAL = 1e-5  # largest difference of two embeddings of one text

Turns = Mapping[str, Callable[[], object]]


def bench_mining(data: str, model: str, texts: int, max_tokens: int, rounds: int, passages: int, peer: bool) -> dict[str, Any]:
    """Return the figures, each with the wanted one.

    texts: that are encoded; passages: of the corpus whose memory is measured, 0: none is.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoding = _encoding(Path(data), model, texts, max_tokens, rounds, device, peer)
    search = _search(rounds, device)
    messages().print("[dim]two ranks of one thread against one[/dim]")
    ranks = on_ranks("launch.bench.mining_ranks", 2, mpi=True, what="ranks", data=data, model=model, rounds=rounds, **RANKS)
    ranks |= {**RANKS, "wanted": WANTED["ranks"]}
    messages().print("[dim]steps of a trainer, with and without an idle miner[/dim]")
    idle = {**measure_idle(Path(data), model, rounds), "wanted": WANTED["idle"]}
    found = {**describe(device), "rounds": rounds, "encoding": encoding, "search": search, "ranks": ranks, "idle": idle}
    if passages:
        messages().print(f"[dim]a service with {counted(passages, 'passage')}: some minutes[/dim]")
        with tempfile.TemporaryDirectory() as folder:
            prepare_service(Path(folder), model, passages)
            memory = on_ranks("launch.bench.mining_ranks", 1, mpi=True, what="memory", folder=folder)
            found["memory"] = {"passages": passages, **memory, "wanted": WANTED["memory"]}
    return found


def _encoding(
    path: Path, model: str, num_texts: int, max_tokens: int, rounds: int, device: torch.device, peer: bool
) -> dict[str, Any]:
    encoder, tokenizer, _ = load_encoder(ModelSettings(name=model, max_passage_tokens=max_tokens))
    encoder.eval().to(device)
    corpus = open_dataset(path, None).corpus
    if len(corpus) < num_texts:
        raise InputError(f"{path} has {counted(len(corpus), 'document')}, fewer than {num_texts}; lower --texts")
    texts = corpus.select(np.linspace(0, len(corpus) - 1, num_texts).astype(int).tolist())
    tokens = tokenize(texts, tokenizer, prefix="", max_tokens=max_tokens)
    rows = np.arange(num_texts)
    batches = _batches(tokens, rows, device)
    turns: dict[str, Callable[[], object]] = {
        "bare model": lambda: _forward(encoder, batches),
        "ours": lambda: encode_rows(encoder, tokens, rows),
    }
    found: dict[str, Any] = {"texts": num_texts, "tokens": int(tokens.lengths.sum()), "max_tokens": max_tokens}
    if peer:
        theirs = _peer(model, max_tokens, device)
        words = list(texts["text"])
        turns["sentence-transformers"] = lambda: theirs.encode(words, normalize_embeddings=encoder.normalize)
        difference = np.abs(theirs.encode(words, normalize_embeddings=encoder.normalize) - encode_rows(encoder, tokens, rows))
        found["largest_difference"] = float(difference.max())
        if not difference.max() <= EQUAL:
            raise RuntimeError(f"the peer's embeddings differ by {difference.max():.1e}: not the same work")
    return found | _speeds(_rounds(turns, rounds, device), WANTED["encoding"], found["tokens"], "tokens_per_s")


def _batches(tokens: TokenTable, rows: np.ndarray, device: torch.device) -> list[dict[str, torch.Tensor]]:
    budget = ENCODE_TOKENS_CUDA if device.type == "cuda" else ENCODE_TOKENS
    chunks = plan_chunks(torch.as_tensor(tokens.lengths[rows]), budget)
    return [{name: tensor.to(device) for name, tensor in tokens.pad(rows[chunk.numpy()]).items()} for chunk in chunks]


def _forward(encoder: Encoder, batches: list[dict[str, torch.Tensor]]) -> None:
    with torch.inference_mode():
        for batch in batches:
            encoder(batch)


def _peer(model: str, max_tokens: int, device: torch.device) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError("the peer is not installed; run: pip install 'negpool[bench]', or use --no-peer") from error
    theirs = SentenceTransformer(resolve_model(model), device=str(device))
    theirs.max_seq_length = max_tokens
    return theirs


def _search(rounds: int, device: torch.device) -> dict[str, Any]:
    query_QD, passage_ND = (unit(n, SEARCH_WIDTH) for n in (SEARCH_QUERIES, SEARCH_PASSAGES))
    rows_n = np.arange(SEARCH_PASSAGES)

    def ours() -> None:
        best = BestOf(query_QD, TOP_K, device)
        best.look_at(passage_ND, rows_n)
        best.keys()

    query, passage = torch.from_numpy(query_QD).to(device), torch.from_numpy(passage_ND).to(device)
    tile = tile_shape(TOP_K, device.type)
    turns: Turns = {"bare product": functools.partial(tiled_product, query, passage, tile), "ours": ours}
    flops = 2 * SEARCH_QUERIES * SEARCH_PASSAGES * SEARCH_WIDTH
    found = {"queries": SEARCH_QUERIES, "passages": SEARCH_PASSAGES, "width": SEARCH_WIDTH, "top_k": TOP_K}
    found |= _speeds(_rounds(turns, rounds, device), WANTED["search"], flops / 1e9, "gflops")
    return found | {"matmul_gflops": round(matmul_rate(device) / 1e9, 1)}


def unit(num_rows: int, width: int) -> np.ndarray:
    """Return random vectors of length 1, (num_rows, width) float32."""
    vectors = np.random.default_rng(num_rows).standard_normal((num_rows, width), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _rounds(turns: Turns, rounds: int, device: torch.device) -> dict[str, list[float]]:
    for work in turns.values():
        work()  # the first call of each loads what it needs
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for name, work in turns.items():
            seconds[name].append(seconds_of(work, device))
            messages().print(f"[dim]round {number + 1}: {name}: {seconds[name][-1]:.2f} s[/dim]")
    return seconds


def _speeds(seconds: dict[str, list[float]], wanted: dict[str, float], work: float, unit_name: str) -> dict[str, Any]:
    """Return everybody's median time and rate, and our rate over theirs, the median of the rounds, beside the wanted one."""
    sides = {
        name: {
            "seconds": round(statistics.median(turns), 3),
            "ratio": round(statistics.median(a / b for a, b in zip(turns, seconds["ours"], strict=True)), 3),
            unit_name: round(work / statistics.median(turns), 1),
        }
        for name, turns in seconds.items()
    }
    ratios = {name: {"found": sides[name]["ratio"], "wanted": wanted[name]} for name in sides if name in wanted}
    return {"sides": sides, "our_rate_over": ratios}
