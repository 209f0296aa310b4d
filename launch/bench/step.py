"""`negpool bench step`: a training step of ours against sentence-transformers' cached loss, in turn in one process.

Both encode the same texts with the same weights, dropout as the model has it, and compute the same loss: distinct queries
and distinct passages, temperature 0.05; before anything is timed, their gradients are compared without dropout. The peer
runs at the best of its settings, found first on a part of the batch. In a first round everybody's memory is measured: the
peak of the process above one floor, models and texts without gradients, with freed blocks returned at once. Times are
medians of the rounds behind it, when the allocator has what it needs, as in every step of a training but the first.
"""

import functools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gradcache import OBJECTIVES, LossOptions, Temperature, cached_step
from gradcache.budget import kept_within, measure_graphs
from gradcache.plan import Chunk, encode_chunk, plan_encoding
from launch.bench.machine import describe, freed_at_once, matmul_rate, measured, seconds_of, start_peak
from launch.bench.pairs import Pairs, distinct_pairs
from launch.bench.peer import SETTINGS, TEMPERATURE, Peer
from launch.output import messages
from launch.ranks import answer
from trainer.backends import parallelize
from trainer.data.datasets import open_dataset
from trainer.encoder.model import Encoder, ModelSettings, load_encoder
from trainer.encoder.tokens import tokenize
from trainer.job import OptimSettings, ParallelSettings
from trainer.world import World, join_world

CHUNK_TOKENS = {"cpu": 4096, "cuda": 65536}
PEER, NONE_KEPT, PLAIN = "sentence-transformers", "ours, no graph kept", "plain, all in one graph"
PEER_TRIAL_PAIRS = 48  # of the batch, to find the peer's best setting
COMPARED_PAIRS = 16
PLAIN_GIB = 8.0  # a plain step keeps all graphs: it is measured on as many pairs as fit
MEMORY_TOKENS, MEMORY_TIMES = 64, 16  # of a text, and the large batch over the small one, where memory is the question

Turns = Mapping[str, Callable[[], None]]


@dataclass
class Cost:
    """What the turns of one of them took."""

    peak_gib: float
    seconds: list[float]


Costs = dict[str, Cost]


def bench_step(
    data: str, model: str, queries: int, max_tokens: int, rounds: int, keep_gib: float, half: bool, peer: bool
) -> dict[str, Any] | None:
    """Return the table on rank 0, None elsewhere. Collective.

    queries: pairs over all ranks; keep_gib: for kept graphs; half: bfloat16 autocast, for ours and the peer.
    """
    world = join_world()
    try:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=half):
            bench = StepBench(world, Path(data), model, queries, max_tokens)
            found = bench.run(rounds, keep_gib, peer) | {"precision": "bf16" if half else "fp32"}
            return found if world.speaks else None
    finally:
        world.leave()


class StepBench:
    """The texts, the model and everybody who takes a step with them."""

    def __init__(self, world: World, path: Path, model: str, queries: int, max_tokens: int):
        self.world, self.model_name, self.max_tokens = world, model, max_tokens
        settings = ModelSettings(name=model, max_query_tokens=max_tokens, max_passage_tokens=max_tokens)
        self.encoder, self.tokenizer, self.traits = load_encoder(settings)
        self.parallel = parallelize(self.encoder, world, ParallelSettings(), OptimSettings())
        self.models: list[nn.Module] = [self.encoder]
        self.chunk_tokens = CHUNK_TOKENS[world.device.type]
        dataset = open_dataset(path, None)
        rows = distinct_pairs(dataset, queries)
        per_rank = len(rows) // world.num_ranks  # as many everywhere: the peer hangs otherwise
        rows = rows[world.rank * per_rank : (world.rank + 1) * per_rank]
        self.texts = (dataset.queries.select(rows[:, 0]), dataset.corpus.select(rows[:, 1]))
        self.pairs = self.cut(max_tokens)

    def cut(self, max_tokens: int) -> Pairs:
        """Return the pairs with texts of at most so many tokens."""
        queries, passages = (tokenize(side, self.tokenizer, prefix="", max_tokens=max_tokens) for side in self.texts)
        query_texts, passage_texts = (list(side["text"]) for side in self.texts)
        return Pairs((query_texts, passage_texts), (queries, passages))

    def run(self, rounds: int, keep_gib: float, peer: bool) -> dict[str, Any]:
        """Measure everybody. Collective."""
        world, pairs, n = self.world, self.pairs, len(self.pairs)
        kept, share_kept = self.graphs_within(keep_gib)
        kept_name = f"ours, {kept} graphs kept"
        turns: Turns = {
            NONE_KEPT: lambda: self.ours(pairs, n, 0),
            kept_name: lambda: self.ours(pairs, n, kept),
        }
        found: dict[str, Any] = {}
        if world.num_ranks == 1:
            found["memory"] = self.memory_by_batch()
        if peer:
            theirs = Peer(world, self.model_name, self.pairs.texts, self.max_tokens)
            self.models.append(theirs.model)
            found["gradient_cosine"] = self.compare_gradients(theirs)
            found["peer_setting"] = setting = self.best_setting(theirs)
            turns = {PEER: lambda: theirs.step(n, setting), **turns}
        found["steps"] = relative(self.rounds(turns, rounds), PEER if peer else NONE_KEPT)
        if world.num_ranks == 1:
            found["against_plain"] = self.against_plain(rounds)
        tokens, flops, rate = int(pairs.lengths.sum()), step_flops(self.encoder, pairs.lengths), matmul_rate(world.device)
        for name, row in found["steps"].items():
            row["tokens_per_rank_per_s"] = round(tokens / row["seconds"])
            # A backward is two forwards' work; what keeps no graph is encoded twice.
            again = {NONE_KEPT: 1.0, kept_name: 1 - share_kept}.get(name, 1.0)
            row["share_of_matmul_rate"] = round((3 + again) * flops / row["seconds"] / rate, 3)
        return found | {
            **describe(world.device),
            "ranks": world.num_ranks,
            "pairs_per_rank": n,
            "max_tokens": self.max_tokens,
            "tokens_per_rank": tokens,
            "dropout": getattr(self.encoder.model.config, "hidden_dropout_prob", 0.0),
            "rounds": rounds,
            "matmul_gflops": round(rate / 1e9, 1),
        }

    def rounds(self, turns: Turns, rounds: int) -> Costs:
        """Return what every turn of everybody took: the slowest rank's time, the largest rank's memory. Collective."""
        device, all_max = self.world.device, self.world.all_max
        self.free_gradients()
        floor = start_peak(device)
        costs: Costs = {}
        for name, turn in turns.items():
            self.free_gradients()
            with freed_at_once(), measured(device, floor) as cost:
                turn()
            costs[name] = Cost(all_max([int(cost.peak_gib * 2**20)])[0] / 2**20, [])
            self._say(f"memory: {name}: {costs[name].peak_gib:.2f} GiB")
        for number in range(rounds):
            for name, turn in turns.items():
                self.free_gradients()
                self.world.barrier()
                seconds = all_max([int(seconds_of(turn, device) * 1e9)])[0] / 1e9
                costs[name].seconds.append(seconds)
                self._say(f"round {number + 1}: {name}: {seconds:.2f} s")
        return costs

    def _say(self, sentence: str) -> None:
        if self.world.speaks:
            messages().print(f"[dim]{sentence}[/dim]")

    def free_gradients(self) -> None:
        for model in self.models:
            model.zero_grad(set_to_none=True)

    def ours(self, pairs: Pairs, count: int, keep_graphs: int | Literal["all"]) -> None:
        """Take our step on the first pairs."""
        cached_step(
            pairs.batch(count, self.parallel.module, self.world.device),
            loss=LossOptions(objective=OBJECTIVES["info_nce"]),
            temperature=Temperature(TEMPERATURE).to(self.world.device),
            sync=self.parallel.sync,
            group=self.world.group,
            chunk_tokens=self.chunk_tokens,
            keep_graphs=keep_graphs,
            seed=0,
            step=0,
        )

    def plain(self, count: int) -> None:
        """Take a step in one graph: every chunk encoded once, autograd for the rest."""
        batch = self.pairs.batch(count, self.encoder, self.world.device)
        plan = plan_encoding(batch.towers, self.chunk_tokens, 0, 0, 0)
        embedding_uD = torch.cat([encode_chunk(chunk, with_graph=True) for chunk in plan.chunks])
        order = torch.empty(plan.num_distinct, dtype=torch.int64)
        order[torch.cat([chunk.places for chunk in plan.chunks])] = torch.arange(plan.num_distinct)
        query, passage = embedding_uD[order[plan.place_n].to(embedding_uD.device)].split(count)
        scores = query @ passage.T / TEMPERATURE
        nn.functional.cross_entropy(scores, torch.arange(count, device=scores.device)).backward()

    def against_plain(self, rounds: int) -> dict[str, Any]:
        """Return our steps against a plain one, on as many pairs as its graphs fit."""
        chunks = self.chunks()
        cost = measure_graphs(chunks[-1].tower)
        gib = sum(cost.of(chunk.num_padded_tokens, int(chunk.lengths.max())) for chunk in chunks) / 2**30
        count = min(len(self.pairs), max(8, int(len(self.pairs) * PLAIN_GIB / gib)))
        turns = {
            PLAIN: lambda: self.plain(count),
            "ours, all graphs kept": lambda: self.ours(self.pairs, count, "all"),
            NONE_KEPT: lambda: self.ours(self.pairs, count, 0),
        }
        return {"pairs": count, "steps": relative(self.rounds(turns, rounds), PLAIN)}

    def memory_by_batch(self) -> dict[str, Any]:
        """Return the peaks of two batches, and their ratio without what must grow: an embedding and a gradient a text.

        Texts are short and repeat in the large batch, because time is not the question.
        """
        pairs = self.cut(min(MEMORY_TOKENS, self.max_tokens))
        counts = [max(2, len(pairs) // 2), MEMORY_TIMES * max(2, len(pairs) // 2)]
        turns = {str(count): functools.partial(self.ours, pairs, count, 0) for count in counts}
        peaks = [cost.peak_gib for cost in self.rounds(turns, 0).values()]
        embeddings = [2 * 2 * count * self.encoder.width * 4 / 2**30 for count in counts]
        aside = [gib - held for gib, held in zip(peaks, embeddings, strict=True)]
        return {
            "max_tokens": min(MEMORY_TOKENS, self.max_tokens),
            "pairs": counts,
            "peak_gib": [round(gib, 3) for gib in peaks],
            "embeddings_gib": [round(gib, 3) for gib in embeddings],
            "ratio": round(aside[1] / aside[0], 3),
        }

    def best_setting(self, peer: Peer) -> dict[str, int]:
        """Return the peer's setting with the shortest step on a part of the batch. Collective."""
        pairs = min(PEER_TRIAL_PAIRS, len(self.pairs))
        turns = {str(setting): functools.partial(peer.step, pairs, setting) for setting in SETTINGS}
        costs = self.rounds(turns, 1)
        return min(SETTINGS, key=lambda setting: min(costs[str(setting)].seconds))

    def compare_gradients(self, peer: Peer) -> float | None:
        """Return the cosine of both gradients without dropout on a few pairs; None on several ranks."""
        if self.world.group is not None:
            return None
        pairs = min(COMPARED_PAIRS, len(self.pairs))
        self.free_gradients()
        for model in self.models:
            model.eval()
        peer.step(pairs, {"mini_batch_size": 8})
        self.ours(self.pairs, pairs, 1)
        for model in self.models:
            model.train()
        theirs, ours = _gradients(peer.model), _gradients(self.encoder)
        a, b = (torch.cat([found[name].flatten().double() for name in ours]) for found in (ours, theirs))
        return round(float(torch.cosine_similarity(a, b, 0)), 7)

    def chunks(self) -> list[Chunk]:
        batch = self.pairs.batch(len(self.pairs), self.parallel.module, self.world.device)
        return list(plan_encoding(batch.towers, self.chunk_tokens, 0, 0, 0).chunks)

    def graphs_within(self, gib: float) -> tuple[int, float]:
        """Return how many of the last chunks keep their graphs within a memory, and their share of the tokens."""
        chunks = self.chunks()
        kept = kept_within(gib * 2**30, chunks, measure_graphs(chunks[-1].tower))
        tokens = [chunk.num_padded_tokens for chunk in chunks]
        return kept, sum(tokens[len(tokens) - kept :]) / sum(tokens)


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients under the names that the transformer itself gives to its parameters."""
    named = ((name.rsplit("model.", 1)[-1], p.grad) for name, p in module.named_parameters())
    return {name: gradient for name, gradient in named if gradient is not None}


def step_flops(encoder: Encoder, lengths: np.ndarray) -> float:
    """Return the operations of one forward of all texts: products with weights, and attention's two."""
    weights = sum(m.weight.numel() for m in encoder.modules() if isinstance(m, nn.Linear))
    config = encoder.model.config
    tokens = lengths.astype(np.float64)
    attention = 4 * config.hidden_size * config.num_hidden_layers
    return float((2 * weights * tokens + attention * tokens**2).sum())


def relative(costs: Costs, base: str) -> dict[str, dict[str, float]]:
    """Return medians, and the median of each round's ratio to the base: rounds differ more than turns of one round do."""
    return {
        name: {
            "seconds": round(statistics.median(cost.seconds), 3),
            "ratio": round(statistics.median(a / b for a, b in zip(cost.seconds, costs[base].seconds, strict=True)), 3),
            "peak_gib": round(cost.peak_gib, 3),
        }
        for name, cost in costs.items()
    }


if __name__ == "__main__":
    answer(bench_step)
