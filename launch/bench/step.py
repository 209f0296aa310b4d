"""`negpool bench step`: a training step of ours against sentence-transformers' cached loss, in turn in one process.

Both encode the same texts with the same weights, dropout as the model has it, and compute the same loss: distinct queries
and distinct passages, temperature 0.05; before anything is timed, their gradients are compared without dropout. The peer
runs at the best of its settings, found first on a part of the batch. In a first round everybody's memory is measured: the
peak of the process above one floor, models and texts without gradients, with freed blocks returned at once. Times are
medians of the rounds behind it, when the allocator has what it needs, as in every step of a training but the first.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gradcache import InfoNCE, LossOptions, Temperature, cached_step
from gradcache.budget import kept_within, measure_graphs
from gradcache.plan import Chunk, encode_chunk, plan_encoding
from launch.bench.flops import forward_flops
from launch.bench.job_path import encoded_by, load
from launch.bench.machine import describe, matmul_rate, start_peak
from launch.bench.made_texts import data_of
from launch.bench.pairs import Pairs, read_pairs, tokenized
from launch.bench.peer import TEMPERATURE, TRIAL_PAIRS, Peer, best_setting
from launch.bench.peers.exact import named_gradients
from launch.bench.shapes import model_of
from launch.bench.turns import Turns, compared, take_turns
from launch.counted import counted
from launch.ranks import answer
from trainer.backends import parallelize
from trainer.encoder.auto import takes_bf16
from trainer.encoder.encode import DTYPES
from trainer.errors import InputError
from trainer.job import OptimSettings, ParallelSettings
from trainer.world import World, join_world

CHUNK_TOKENS = {"cpu": 4096, "cuda": 65536}
PEER, NONE_KEPT, PLAIN = "sentence-transformers", "ours, no graph kept", "plain, all in one graph"
COMPARED_PAIRS = 16
PLAIN_GIB = 8.0  # a plain step keeps all graphs: it is measured on as many pairs as fit
MEMORY_TOKENS, MEMORY_TIMES = 64, 16  # of a text, and the large batch over the small one, where memory is the question

Ways = Mapping[str, Callable[[], None]]


def bench_step(
    data: str, model: str, queries: int, max_tokens: int, rounds: int, keep_gib: float, half: bool | None, peer: bool
) -> dict[str, Any] | None:
    """Return the table on rank 0, None elsewhere. Collective.

    queries: pairs over all ranks; keep_gib: for kept graphs; half: bfloat16 autocast, for ours and the peer, None: on a GPU.
    """
    world = join_world()
    try:
        bench = StepBench(world, Path(data), model, queries, max_tokens, precision_of(half, world.device))
        found = bench.run(rounds, keep_gib, peer)
        return found if world.speaks else None
    finally:
        world.leave()


def precision_of(half: bool | None, device: torch.device) -> Literal["bf16", "fp32"]:
    """Return what an encoder multiplies in where a person asks for half precision, or does not say."""
    return "bf16" if half or (half is None and takes_bf16(device)) else "fp32"


class StepBench:
    """The texts, the model and everybody who takes a step with them."""

    def __init__(
        self, world: World, path: Path, model: str, queries: int, max_tokens: int, precision: str = "fp32", compiles: bool = False
    ):
        """queries: pairs over all ranks. path, model: also by the names of `made_texts.py` and `shapes.py`."""
        self.world, self.model_name, self.max_tokens, self.precision = world, model_of(model), max_tokens, precision
        self.encoder, self.tokenizer = load(model, max_tokens)
        self.parallel = parallelize(self.encoder, world, ParallelSettings(), OptimSettings())
        self.rows = encoded_by(self.encoder, self.parallel.module, precision, world.device, compiles)
        self.models: list[nn.Module] = [self.encoder]
        self.chunk_tokens = CHUNK_TOKENS[world.device.type]
        self.pairs = read_pairs(data_of(str(path)), self.tokenizer, queries, max_tokens, world.rank, world.num_ranks)

    def run(self, rounds: int, keep_gib: float, peer: bool) -> dict[str, Any]:
        """Measure everybody. Collective."""
        world, pairs, n = self.world, self.pairs, len(self.pairs)
        kept, share_kept = self.graphs_within(keep_gib)
        kept_name = f"ours, {counted(kept, 'graph')} kept"
        ways: Ways = {
            NONE_KEPT: lambda: self.ours(pairs, n, 0),
            kept_name: lambda: self.ours(pairs, n, kept),
        }
        found: dict[str, Any] = {}
        if world.num_ranks == 1:
            found["memory"] = self.memory_by_batch()
        if peer:
            theirs = self.add_peer()
            found["gradient_cosine"] = self.compare_gradients(theirs)
            found["peer_trials"] = trials = theirs.trials(min(TRIAL_PAIRS[world.device.type], n), self.free_gradients)
            setting = best_setting(trials, world.device)
            found["peer_setting"] = setting and dict(setting)
            if setting is not None:
                ways = {PEER: lambda: theirs.step(n, setting), **ways}
        turns = self.rounds(ways, rounds)
        if NONE_KEPT not in turns:
            raise InputError("our step does not fit into this machine's memory; set --queries or --max-tokens lower")
        found["steps"] = compared(turns, PEER if PEER in turns else NONE_KEPT, {})
        if world.num_ranks == 1:
            found["against_plain"] = self.against_plain(rounds)
        rate = self.rate()
        for name, row in found["steps"].items():
            # A backward is two forwards' work; what keeps no graph is encoded twice.
            again = {NONE_KEPT: 1.0, kept_name: 1 - share_kept}.get(name, 1.0)
            row |= self.speeds(row["seconds"], 3 + again, rate)
        return found | {
            **describe(world.device),
            "precision": self.precision,
            "ranks": world.num_ranks,
            "pairs_per_rank": n,
            "max_tokens": self.max_tokens,
            "tokens_per_rank": int(pairs.lengths.sum()),
            "dropout": getattr(self.encoder.model.config, "hidden_dropout_prob", 0.0),
            "rounds": rounds,
            "matmul_gflops": round(rate / 1e9, 1),
        }

    def add_peer(self) -> Peer:
        """Return sentence-transformers on our weights and texts, which takes what we multiply in."""
        peer = Peer(self.world, self.model_name, self.pairs.texts, self.max_tokens, self.precision)
        self.models.append(peer.model)
        return peer

    def rate(self) -> float:
        """Return the operations per second of a large product in what the encoder multiplies in."""
        return matmul_rate(self.world.device, DTYPES[self.precision])

    def speeds(self, seconds: float, forwards: float, rate: float) -> dict[str, float]:
        """Return the tokens per second of a step of all pairs, and the share of a rate; forwards: the work of so many."""
        flops = forwards * forward_flops(self.encoder, self.pairs.lengths)
        tokens = int(self.pairs.lengths.sum())
        return {"tokens_per_rank_per_s": round(tokens / seconds), "share_of_matmul_rate": round(flops / seconds / rate, 3)}

    def rounds(self, ways: Ways, rounds: int) -> dict[str, Turns]:
        """Return what every turn of everybody took, memory above one floor. Collective."""
        self.free_gradients()
        return take_turns(ways, rounds, self.world, self.free_gradients, start_peak(self.world.device))

    def free_gradients(self) -> None:
        for model in self.models:
            model.zero_grad(set_to_none=True)

    def ours(self, pairs: Pairs, count: int, keep_graphs: int | Literal["all"]) -> None:
        """Take our step on the first pairs."""
        cached_step(
            pairs.batch(count, self.rows),
            loss=LossOptions(objective=InfoNCE()),
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
        batch = self.pairs.batch(count, self.rows)
        plan = plan_encoding(batch.towers, self.chunk_tokens, 0, 0, 0)
        embedding_uD = torch.cat([encode_chunk(chunk, with_graph=True) for chunk in plan.chunks])
        query, passage = embedding_uD[plan.place_n.to(embedding_uD.device)].split(count)
        scores = query @ passage.T / TEMPERATURE
        nn.functional.cross_entropy(scores, torch.arange(count, device=scores.device)).backward()

    def against_plain(self, rounds: int) -> dict[str, Any]:
        """Return our steps against a plain one, on as many pairs as its graphs fit."""
        chunks = self.chunks()
        cost = measure_graphs(chunks[-1].tower)
        gib = sum(cost.of(chunk.num_padded_tokens, int(chunk.lengths.max())) for chunk in chunks) / 2**30
        count = min(len(self.pairs), max(8, int(len(self.pairs) * PLAIN_GIB / gib)))
        ways = {
            PLAIN: lambda: self.plain(count),
            "ours, all graphs kept": lambda: self.ours(self.pairs, count, "all"),
            NONE_KEPT: lambda: self.ours(self.pairs, count, 0),
        }
        turns = self.rounds(ways, rounds)
        return {"pairs": count, "steps": compared(turns, PLAIN if PLAIN in turns else NONE_KEPT, {})}

    def memory_by_batch(self) -> dict[str, Any]:
        """Return the peaks of two batches, and their ratio without what must grow: an embedding and a gradient a text.

        Texts are short and repeat in the large batch, because time is not the question.
        """
        pairs = tokenized(self.pairs.texts, self.tokenizer, min(MEMORY_TOKENS, self.max_tokens))
        counts = [max(2, len(pairs) // 2), MEMORY_TIMES * max(2, len(pairs) // 2)]
        ways = {f"{count} pairs": functools.partial(self.ours, pairs, count, 0) for count in counts}
        peaks = [turns.peak_gib for turns in self.rounds(ways, 0).values()]
        embeddings = [2 * 2 * count * self.encoder.width * 4 / 2**30 for count in counts]
        aside = [gib - held for gib, held in zip(peaks, embeddings, strict=True)]
        return {
            "max_tokens": min(MEMORY_TOKENS, self.max_tokens),
            "pairs": counts,
            "peak_gib": [round(gib, 3) for gib in peaks],
            "embeddings_gib": [round(gib, 3) for gib in embeddings],
            "ratio": round(aside[1] / aside[0], 3),
        }

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
        theirs, ours = named_gradients(peer.model), named_gradients(self.encoder)
        a, b = (torch.cat([found[name].flatten().double() for name in ours]) for found in (ours, theirs))
        return round(float(torch.cosine_similarity(a, b, 0)), 7)

    def chunks(self) -> list[Chunk]:
        batch = self.pairs.batch(len(self.pairs), self.rows)
        return list(plan_encoding(batch.towers, self.chunk_tokens, 0, 0, 0).chunks)

    def graphs_within(self, gib: float) -> tuple[int, float]:
        """Return how many of the last chunks keep their graphs within a memory, and their share of the tokens."""
        chunks = self.chunks()
        kept = kept_within(gib * 2**30, chunks, measure_graphs(chunks[-1].tower))
        tokens = [chunk.num_padded_tokens for chunk in chunks]
        return kept, sum(tokens[len(tokens) - kept :]) / sum(tokens)


if __name__ == "__main__":
    answer(bench_step)
