"""`negpool bench step`: a training step of ours against sentence-transformers' cached loss, in turn in one process.

Both encode the same texts with the same weights, dropout as the model has it, and compute the same loss: distinct queries
and distinct passages, temperature 0.05; before anything is timed, their gradients are compared without dropout. The peer
runs at the best of its settings, found first on a part of the batch. Times are medians of rounds in which everybody
takes a turn; memory is the peak of the process above what it held before.
"""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradcache import OBJECTIVES, Batch, Temperature, Tower, cached_step
from gradcache.plan import encode_chunk, plan_encoding
from launch.bench.machine import describe, matmul_rate, measured
from launch.output import messages
from launch.ranks import answer
from trainer.data.datasets import RetrievalData, open_dataset
from trainer.encoder.model import Encoder, ModelSettings, load_encoder, resolve_model
from trainer.encoder.tokens import TokenTable, tokenize
from trainer.errors import InputError
from trainer.job import ParallelSettings
from trainer.parallel import parallelize
from trainer.world import World, join_world

TEMPERATURE = 0.05
PEER_SETTINGS: list[dict[str, int]] = [
    {"mini_batch_size": 16},
    {"mini_batch_size": 32},
    {"mini_batch_size": 64},
    {"mini_batch_num_tokens": 4096},
    {"mini_batch_num_tokens": 8192},
]
PEER_TRIAL_PAIRS = 48  # of the batch, to find the peer's best setting
GRAPH_BYTES_PROBE_ROWS = 8
PLAIN_GIB = 8.0  # a plain step keeps all graphs: it is measured on as many pairs as fit


def bench_step(
    data: str, model: str, queries: int, max_tokens: int, rounds: int, keep_gib: float, peer: bool
) -> dict[str, Any] | None:
    """Return the table on rank 0, None elsewhere. Collective. queries: pairs over all ranks; keep_gib: for kept graphs."""
    world = join_world()
    try:
        bench = _Bench(world, Path(data), model, queries, max_tokens)
        return bench.run(rounds, keep_gib, peer)
    finally:
        world.leave()


class _Bench:
    """The texts, the model and everybody who takes a step with them."""

    def __init__(self, world: World, path: Path, model: str, queries: int, max_tokens: int):
        self.world, self.model_name, self.max_tokens = world, model, max_tokens
        settings = ModelSettings(name=model, max_query_tokens=max_tokens, max_passage_tokens=max_tokens)
        self.encoder, self.tokenizer, self.traits = load_encoder(settings)
        self.parallel = parallelize(self.encoder, world, ParallelSettings())
        dataset = open_dataset(path, None)
        pairs = distinct_pairs(dataset, queries)
        per_rank = len(pairs) // world.num_ranks  # as many everywhere: the peer hangs otherwise
        self.pairs = pairs[world.rank * per_rank : (world.rank + 1) * per_rank]
        self.queries = self._tokens(dataset.queries.select(self.pairs[:, 0]))
        self.passages = self._tokens(dataset.corpus.select(self.pairs[:, 1]))
        self.texts = (
            dataset.queries.select(self.pairs[:, 0])["text"],
            [text for text in dataset.corpus.select(self.pairs[:, 1])["text"]],
        )

    def _tokens(self, texts) -> TokenTable:
        return tokenize(texts, self.tokenizer, prefix="", max_tokens=self.max_tokens)

    def run(self, rounds: int, keep_gib: float, peer: bool) -> dict[str, Any] | None:
        """Measure everybody. Collective."""
        world, n = self.world, len(self.pairs)
        chunk_tokens = 4096 if world.device.type == "cpu" else 65536
        kept = self.graphs_within(keep_gib, chunk_tokens)
        plain_pairs = min(n, max(8, int(n * PLAIN_GIB / max(PLAIN_GIB, self.all_graphs_gib(chunk_tokens)))))
        turns: dict[str, Any] = {
            "ours, no graph kept": lambda: self.ours(n, chunk_tokens, 0),
            f"ours, {kept} graphs kept": lambda: self.ours(n, chunk_tokens, kept),
        }
        found: dict[str, Any] = {}
        if peer:
            theirs = _Peer(self)
            found["gradient_cosine"] = theirs.compare_gradients()
            setting = theirs.best_setting()
            found["peer_setting"] = setting
            turns = {"sentence-transformers": lambda: theirs.step(n, setting), **turns}
        costs = _rounds(turns, rounds, world)
        if world.num_ranks == 1:
            part = {
                "plain, all in one graph": lambda: self.plain(plain_pairs, chunk_tokens),
                "ours, all graphs kept": lambda: self.ours(plain_pairs, chunk_tokens, "all"),
                "ours, no graph kept": lambda: self.ours(plain_pairs, chunk_tokens, 0),
            }
            found["against_plain"] = {"pairs": plain_pairs, **_relative(_rounds(part, rounds, world), "plain, all in one graph")}
        if not world.speaks:
            return None
        lengths = np.concatenate([self.queries.lengths, self.passages.lengths])
        rate = matmul_rate(world.device)
        flops = step_flops(self.encoder, lengths)
        found |= {
            **describe(world.device),
            "ranks": world.num_ranks,
            "pairs_per_rank": n,
            "max_tokens": self.max_tokens,
            "tokens_per_rank": int(lengths.sum()),
            "dropout": getattr(self.encoder.model.config, "hidden_dropout_prob", 0.0),
            "rounds": rounds,
            "matmul_gflops": round(rate / 1e9, 1),
            "steps": _relative(costs, "sentence-transformers" if peer else "ours, no graph kept"),
        }
        for name, row in found["steps"].items():
            row["tokens_per_rank_per_s"] = round(int(lengths.sum()) / row["seconds"])
            if name.startswith("ours"):
                # Three units of work where the graph is kept, four where it is made again.
                again = 1.0 if " no " in name else 1 - self.share_kept
                row["share_of_matmul_rate"] = round((3 + again) * flops / row["seconds"] / rate, 3)
        return found

    def batch(self, pairs: int, encode: nn.Module | None = None) -> Batch:
        """Return the first pairs of this rank."""
        tables, device = (self.queries, self.passages), self.world.device
        rows = np.arange(pairs)

        def load(side: int):
            return lambda chosen: {name: t.to(device) for name, t in tables[side].pad(rows[chosen.numpy()]).items()}

        towers = [
            Tower(
                encode=encode or self.parallel.module,
                lengths=torch.from_numpy(table.lengths[:pairs].astype(np.int64)),
                load=load(i),
            )
            for i, table in enumerate(tables)
        ]
        keys = torch.from_numpy(np.concatenate([table.keys(rows) for table in tables]))
        target = torch.arange(pairs)
        return Batch(towers=towers, num_queries=pairs, keys=keys, target=target, positive_keys=keys[pairs:, None])

    def ours(self, pairs: int, chunk_tokens: int, keep_graphs) -> None:
        """Take our step."""
        self.encoder.zero_grad(set_to_none=True)
        cached_step(
            self.batch(pairs),
            objective=OBJECTIVES["info_nce"],
            temperature=Temperature(TEMPERATURE).to(self.world.device),
            sync=self.parallel.sync,
            group=self.world.group,
            chunk_tokens=chunk_tokens,
            keep_graphs=keep_graphs,
            seed=0,
            step=0,
        )

    def plain(self, pairs: int, chunk_tokens: int) -> None:
        """Take a step in one graph: every chunk encoded once, autograd for the rest."""
        self.encoder.zero_grad(set_to_none=True)
        plan = plan_encoding(self.batch(pairs).towers, chunk_tokens, 0, 0, 0)
        embedding_uD = torch.cat([encode_chunk(chunk, with_graph=True) for chunk in plan.chunks])
        order = torch.empty(plan.num_distinct, dtype=torch.int64)
        order[torch.cat([chunk.places for chunk in plan.chunks])] = torch.arange(plan.num_distinct)
        query, passage = embedding_uD[order[plan.place_n].to(embedding_uD.device)].split(pairs)
        scores = query @ passage.T / TEMPERATURE
        nn.functional.cross_entropy(scores, torch.arange(pairs, device=scores.device)).backward()

    def all_graphs_gib(self, chunk_tokens: int) -> float:
        """Return about how much memory the graphs of the whole batch would take."""
        plan = plan_encoding(self.batch(len(self.pairs)).towers, chunk_tokens, 0, 0, 0)
        return sum(graph_bytes(chunk) for chunk in plan.chunks[:1]) / plan.chunks[0].num_padded_tokens * sum(
            chunk.num_padded_tokens for chunk in plan.chunks) / 2**30  # fmt: skip

    def graphs_within(self, gib: float, chunk_tokens: int) -> int:
        """Return how many of the last chunks keep their graphs within a memory, and note their share of the tokens."""
        plan = plan_encoding(self.batch(len(self.pairs)).towers, chunk_tokens, 0, 0, 0)
        per_token = graph_bytes(plan.chunks[0]) / plan.chunks[0].num_padded_tokens
        tokens = [chunk.num_padded_tokens for chunk in reversed(plan.chunks)]
        kept = int(np.searchsorted(np.cumsum(tokens) * per_token, gib * 2**30, side="right"))
        self.share_kept = sum(tokens[:kept]) / sum(tokens)
        return kept


class _Peer:
    """sentence-transformers 5 or newer: its cached loss on the same weights and texts."""

    def __init__(self, bench: _Bench):
        try:
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
        except ImportError as error:
            raise InputError("the peer is not installed; run: pip install 'negpool[bench]', or use --no-peer") from error
        self.loss_class = CachedMultipleNegativesRankingLoss
        self.bench, world = bench, bench.world
        self.model = SentenceTransformer(resolve_model(bench.model_name), device=str(world.device))
        self.model.max_seq_length = bench.max_tokens
        self.model.train()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("pooler" not in name)  # not part of the embedding: DDP would wait for its gradient
        self.called: nn.Module = self.model
        if world.group is not None:
            self.called = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.features = [self.model.tokenize(texts) for texts in bench.texts]

    def step(self, pairs: int, setting: dict[str, int]) -> None:
        """Take the peer's step on the first pairs."""
        self.model.zero_grad(set_to_none=True)
        gather = {"gather_across_devices": True} if self.bench.world.group is not None else {}
        loss = self.loss_class(self.called, scale=1 / TEMPERATURE, **{"mini_batch_size": 32, **setting}, **gather)
        device = self.bench.world.device
        features = [{k: v[:pairs].to(device) for k, v in side.items() if isinstance(v, Tensor)} for side in self.features]
        loss(features, None).backward()

    def best_setting(self) -> dict[str, int]:
        """Return the setting with the shortest of two steps on a part of the batch. Collective."""
        pairs = min(PEER_TRIAL_PAIRS, len(self.bench.pairs))
        turns = {str(i): lambda s=s: self.step(pairs, s) for i, s in enumerate(PEER_SETTINGS)}
        costs = _rounds(turns, 2, self.bench.world)
        return PEER_SETTINGS[int(min(costs, key=lambda i: min(seconds for seconds, _ in costs[i])))]

    def compare_gradients(self) -> float | None:
        """Return the cosine of both gradients without dropout on a few pairs; None on several ranks."""
        if self.bench.world.group is not None:
            return None
        pairs = min(16, len(self.bench.pairs))
        for module in (self.model, self.bench.encoder):
            module.eval()
        self.step(pairs, {"mini_batch_size": 8})
        self.bench.ours(pairs, 1024, 1)
        for module in (self.model, self.bench.encoder):
            module.train()
        theirs, ours = _gradients(self.model), _gradients(self.bench.encoder)
        a, b = (torch.cat([found[name].flatten().double() for name in ours]) for found in (ours, theirs))
        return round(float(torch.cosine_similarity(a, b, 0)), 7)


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients under the names that the transformer itself gives to its parameters."""
    named = ((name.rsplit("model.", 1)[-1], p.grad) for name, p in module.named_parameters())
    return {name: gradient for name, gradient in named if gradient is not None}


def distinct_pairs(data: RetrievalData, num_pairs: int) -> np.ndarray:
    """Return (query row, corpus row) of judged pairs with distinct texts on both sides, (n, 2) int64."""
    queries, corpus = data.queries["text"], data.corpus["text"]
    seen_queries: set[str] = set()
    seen_passages: set[str] = set()
    pairs = []
    for split in sorted(data.qrels, key=lambda name: name != "train"):
        rows = data.training_queries(split)
        indptr, positives = data.positives(rows, split)
        for number, row in enumerate(rows):
            passage = int(positives[indptr[number]])
            if queries[row] not in seen_queries and corpus[passage] not in seen_passages:
                seen_queries.add(queries[row])
                seen_passages.add(corpus[passage])
                pairs.append((int(row), passage))
            if len(pairs) == num_pairs:
                return np.array(pairs)
    raise InputError(f"{data.path} has {len(pairs)} pairs of distinct texts, fewer than {num_pairs}; lower --queries")


def graph_bytes(chunk) -> int:
    """Return the bytes that the graph of a chunk holds for its backward, parameters aside."""
    from gradcache.budget import saved_bytes

    return saved_bytes(lambda: encode_chunk(chunk, with_graph=True))


def step_flops(encoder: Encoder, lengths: np.ndarray) -> float:
    """Return the operations of one forward of all texts: products with weights, and attention's two."""
    weights = sum(m.weight.numel() for m in encoder.modules() if isinstance(m, nn.Linear))
    config = encoder.model.config
    tokens = lengths.astype(np.float64)
    attention = 4 * config.hidden_size * config.num_hidden_layers
    return float((2 * weights * tokens + attention * tokens**2).sum())


def _rounds(turns: dict[str, Any], rounds: int, world: World) -> dict[str, list[tuple[float, float]]]:
    """Return (seconds, GiB) of every turn of everybody: the slowest rank's. Collective."""
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    for number in range(rounds):
        for name, turn in turns.items():
            world.barrier()
            with measured(world.device) as cost:
                turn()
            nanoseconds, kib = world.all_max([int(cost.seconds * 1e9), int(cost.peak_gib * 2**20)])
            costs[name].append((nanoseconds / 1e9, kib / 2**20))
            if world.speaks:
                messages().print(f"[dim]round {number + 1}: {name}: {nanoseconds / 1e9:.2f} s, {kib / 2**20:.2f} GiB[/dim]")
    return costs


def _relative(costs: dict[str, list[tuple[float, float]]], base: str) -> dict[str, dict[str, float]]:
    """Return medians, and the median of each round's ratio to the base: rounds differ more than turns of one round do."""
    rows = {}
    for name, turns in costs.items():
        rows[name] = {
            "seconds": round(statistics.median(seconds for seconds, _ in turns), 3),
            "ratio": round(statistics.median(a / b for (a, _), (b, _) in zip(turns, costs[base], strict=True)), 3),
            "peak_gib": round(statistics.median(gib for _, gib in turns), 3),
        }
    return rows


if __name__ == "__main__":
    answer(bench_step)
