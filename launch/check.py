"""`negpool check`: the gradients of cached steps on a job's own model, data and ranks, against one process and one graph.

Rank 0 computes the reference for the rows of all ranks, in one graph; then every variant of the cached step runs on all
ranks under the job's backend, and its whole gradients are compared, group by group and for the temperature. Dropout stays
as the job has it: both draw the same. All of it is in float32, or TensorFloat-32 if the job says so; whether half precision is
precise enough for a model is not a question of how its steps are cut.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gradcache import Batch, StepResult, Temperature, cached_step, reference_step
from launch.bench.machine import measured
from launch.counted import counted
from launch.jobfile import Override, read_job
from launch.ranks import answer, on_ranks
from trainer.backends import parallelize
from trainer.budget import CPU_BUDGET
from trainer.data.collate import RowEncoder, TrainingSet, Wants, collate
from trainer.data.datasets import open_data
from trainer.data.sampler import choice, global_batch, rank_slice
from trainer.encoder.model import load_encoder
from trainer.encoder.packed import is_packable
from trainer.encoder.towers import SIDES, Encoder
from trainer.errors import InputError
from trainer.handoff.negatives import Negatives
from trainer.job import OptimSettings, PrecisionSettings, TrainJob
from trainer.loading import memory_bytes
from trainer.parallel import Parallel
from trainer.precision import set_tf32
from trainer.prepare import tokenized
from trainer.tasks import loss_options
from trainer.world import World, join_world

MAX_RATIO_ERROR, MIN_COSINE = 1e-4, 0.99999  # float32 sums in another order
REFERENCE_QUERIES = 64  # of a step over all ranks; the reference keeps every graph
SMALL_TEMPERATURE_GRADIENT = 0.01  # of the inverse temperature; below, float32 cancels most of its digits
VARIANTS: dict[str, dict[str, Any]] = {  # what a step may be told; all must give one gradient
    "cached": {"keep_graphs": 0},
    "kept graphs": {"keep_graphs": "all"},
    "small chunks": {"keep_graphs": 1, "chunk_tokens": 512},
    "tiled": {"keep_graphs": "all", "loss": {"tile_rows": 5}},
    "queries travel": {"keep_graphs": "all", "loss": {"gather": "queries"}},
    "passages travel": {"keep_graphs": "all", "loss": {"gather": "passages"}},
}
PACKED = "packed texts, without dropout"  # one behind the other, as a GPU takes them in half precision


def check_job(
    job: Path | None, overrides: Sequence[Override], ranks: int, queries: int, in_children: bool = False
) -> dict[str, Any]:
    """Return what was found; `ok` says whether all gradients agree.

    in_children: leave this process as it is, with one rank, too.
    """
    path = None if job is None else str(job)
    if ranks == 1 and "RANK" not in os.environ and not in_children:
        found = check_here(path, overrides, queries)
        assert found is not None
        return found
    return on_ranks("launch.check", ranks, job=path, overrides=list(overrides), queries=queries)


def check_here(job: str | None, overrides: Sequence[Override], queries: int) -> dict[str, Any] | None:
    """Return what was found on rank 0, None elsewhere. Collective."""
    train = read_job(None if job is None else Path(job), overrides).train
    set_tf32(train.precision)
    world = join_world(tf32=train.precision.tf32, compiles=train.model.compile, timeout_s=train.parallel.timeout_s)
    try:
        return _check(train, world, min(queries, train.batch.queries))
    finally:
        world.leave()


def _check(job: TrainJob, world: World, num_queries: int) -> dict[str, Any] | None:
    data = open_data(job.data, job.sources)
    encoder, tokenizer, traits = load_encoder(job.model)
    job.loss.check_model(encoder.width)
    job.loss.check_memory(-world.all_max([-memory_bytes(world)])[0])
    dataset = tokenized(job, data, tokenizer, traits)
    if dataset.num_queries < num_queries:
        raise InputError(f"{data.path} has {counted(dataset.num_queries, 'training query')}; set batch.queries lower")
    plain = copy.deepcopy(encoder).to(world.device) if world.speaks else None
    parallel = parallelize(encoder, world, job.parallel, OptimSettings())
    step = _Step(job, world, dataset, len(data.corpus), num_queries, encoder.has_two_towers)
    variants: dict[str, Any] = {}
    expected = None
    if plain is not None:
        with measured(world.device) as cost:
            expected = _reference(step, plain, parallel)
        variants["plain, one process, one graph"] = {
            "seconds": round(cost.seconds / len(expected), 3),
            "peak_memory_gib": round(cost.peak_gib, 3),
        }
    world.barrier()
    floors = {"temperature": SMALL_TEMPERATURE_GRADIENT / job.loss.temperature}
    for name, options in VARIANTS.items():
        with measured(world.device) as cost:
            result, gradients = step.cached(parallel, **dict(options))
        peak_kib = world.all_max([int(cost.peak_gib * 2**20)])[0]
        if expected is not None:
            tokens_per_s = result.num_tokens / (result.encode_s + result.loss_s + result.backward_s)
            variants[name] = {
                **compare(gradients, expected[options.get("chunk_tokens", step.chunk_tokens)], floors),
                "chunks": result.num_chunks,
                "peak_memory_gib": round(peak_kib / 2**20, 3),
                "tokens_per_rank_per_s": round(tokens_per_s),
                "share_padding": round(1 - result.num_tokens / max(1, result.num_padded_tokens), 4),
                "share_encoded_twice": round(result.share_encoded_twice, 4),
            }
    if plain is not None and all(is_packable(plain.side(side).model) for side in SIDES):
        variants[PACKED] = _packed(step, plain, floors)
    few, many = (step.collectives(parallel, tokens) for tokens in (10**9, 512))
    if not world.speaks:
        return None
    compared = [row for row in variants.values() if "groups" in row]
    worst = max(row["max_ratio_error"] for row in compared)
    cosine = min(row["min_cosine"] for row in compared)
    return {
        "ok": worst <= MAX_RATIO_ERROR and cosine >= MIN_COSINE,
        "backend": job.parallel.backend if world.group is not None or job.parallel.backend.startswith("zero") else "none",
        "reduce": job.parallel.reduce,
        "offload": job.parallel.offload,
        "ranks": world.num_ranks,
        "queries": num_queries,
        "model": job.model.name,
        "tf32": job.precision.tf32,
        "max_ratio_error": worst,
        "min_cosine": cosine,
        "variants": variants,
        "collectives": few,
        "collectives_do_not_follow_chunks": few == many,
        **({} if few == many else {"collectives_with_small_chunks": many}),
    }


class _Step:
    """One step of the job, on the same rows whoever takes it."""

    def __init__(
        self, job: TrainJob, world: World, dataset: TrainingSet, num_passages: int, num_queries: int, has_two_towers: bool
    ):
        self.job, self.world, self.dataset, self.has_two_towers = job, world, dataset, has_two_towers
        self.rows = global_batch(job.run.seed, 0, dataset.num_queries, num_queries)
        self.negatives = _random_negatives(dataset.num_queries, num_passages, job.negatives.per_query)
        chunk = job.chunk
        self.chunk_tokens = CPU_BUDGET.chunk_tokens if chunk.tokens == "auto" else chunk.tokens
        self.loss = loss_options(job.loss, PrecisionSettings(encode="fp32", products="fp32"))
        self.options: dict[str, Any] = {"seed": job.run.seed, "step": 0}

    def batch(self, rank: int, encode: nn.Module, is_packed: bool = False) -> Batch:
        return collate(
            self.dataset,
            self.negatives,
            rank_slice(self.rows, rank, self.world.num_ranks),
            RowEncoder(encode, self.world.device, self.has_two_towers, is_packed),
            per_query=self.job.negatives.per_query,
            seed=self.job.run.seed,
            step=0,
            wants=Wants.of(self.loss.objective),
        )

    def temperature(self) -> Temperature:
        return Temperature(self.job.loss.temperature, learnable=True).to(self.world.device)

    def plain(self, encoder: nn.Module, is_packed: bool = False, **options: Any) -> dict[str, Tensor]:
        """Return the gradients of the reference for the rows of all ranks, in this process."""
        encoder.zero_grad(set_to_none=True)
        temperature = self.temperature()
        batches = [self.batch(rank, encoder, is_packed) for rank in range(self.world.num_ranks)]
        reference_step(batches, loss=self.loss, temperature=temperature, **self.options | options)
        gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
        assert temperature.log_scale.grad is not None
        return {**gradients, "temperature": temperature.log_scale.grad}

    def cached(self, parallel: Parallel, **options: Any) -> tuple[StepResult, dict[str, Tensor | None]]:
        """Take a cached step and return the whole gradients. Collective."""
        temperature = self.temperature()
        defaults = {"chunk_tokens": self.chunk_tokens}
        loss = replace(self.loss, **options.pop("loss", {}))
        result = cached_step(
            self.batch(self.world.rank, parallel.module),
            loss=loss,
            temperature=temperature,
            sync=parallel.sync,
            group=self.world.group,
            **defaults | self.options | options,
        )
        gradients = parallel.full_gradients()
        parallel.clear_gradients()
        return result, {**gradients, "temperature": temperature.log_scale.grad}

    def collectives(self, parallel: Parallel, chunk_tokens: int) -> dict[str, int]:
        """Return how often this rank called each collective in a step. Collective."""
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            self.cached_only(parallel, chunk_tokens)
        found = {e.key.removeprefix("c10d::").strip("_"): e.count for e in seen.key_averages() if e.key.startswith("c10d::")}
        parallel.clear_gradients()
        return dict(sorted(found.items()))

    def cached_only(self, parallel: Parallel, chunk_tokens: int) -> None:
        cached_step(
            self.batch(self.world.rank, parallel.module),
            loss=self.loss,
            temperature=self.temperature(),
            sync=parallel.sync,
            group=self.world.group,
            chunk_tokens=chunk_tokens,
            keep_graphs="all",
            **self.options,
        )


def _reference(step: _Step, encoder: nn.Module, parallel: Parallel) -> dict[int, dict[str, Tensor]]:
    """Return the gradients of the reference for each budget of chunk tokens that a variant uses: draws follow chunks."""
    equal_chunks = parallel.sync.communicates_in_forward and step.world.group is not None
    every = {options.get("chunk_tokens", step.chunk_tokens) for options in VARIANTS.values()}
    return {tokens: step.plain(encoder, chunk_tokens=tokens, equal_chunks=equal_chunks) for tokens in sorted(every)}


def _packed(step: _Step, encoder: Encoder, floors: Mapping[str, float]) -> dict[str, Any]:
    """Return how the gradients of packed texts compare with those of padded ones, without dropout: its draws follow shapes."""
    was_training = encoder.training
    encoder.eval()
    packed, padded = (step.plain(encoder, is_packed, chunk_tokens=step.chunk_tokens) for is_packed in (True, False))
    encoder.train(was_training)
    return compare(packed, padded, floors)


def compare(
    actual: Mapping[str, Tensor | None], expected: dict[str, Tensor], floors: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return ratio of norms and cosine of each group of parameters, and the worst of them.

    A group is a layer, or whatever else stands beside the layers. A norm below a group's floor is taken to be the floor:
    the temperature's gradient is one number, a sum of terms as large as the inverse temperature, of which little may be
    left. Raises ValueError where there is nothing to compare.
    """
    groups: dict[str, list[str]] = {}
    for name in expected:
        groups.setdefault(group_of(name), []).append(name)
    rows = {}
    for group, names in groups.items():
        a, b = (torch.cat([_known(g, name).double().flatten().cpu() for name in names]) for g in (actual, expected))
        if not float(b.norm()) > 0:
            raise ValueError(f"the reference has no gradient for {group}; nothing would be proved")
        floor = max(0.0, (floors or {}).get(group, 0.0) - float(b.norm()))
        rows[group] = {
            "ratio": round((float(a.norm()) + floor) / (float(b.norm()) + floor), 7),
            "cosine": round(float(torch.cosine_similarity(a, b, 0)), 8),
        }
    return {
        "max_ratio_error": max(abs(row["ratio"] - 1) for row in rows.values()),
        "min_cosine": min(row["cosine"] for row in rows.values()),
        "groups": rows,
    }


def group_of(name: str) -> str:
    """Return a parameter's group: up to the number of its layer, or its first two words."""
    words = name.split(".")
    numbers = [i for i, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: numbers[0] + 1] if numbers else words[:2])


def _known(gradients: Mapping[str, Tensor | None], name: str) -> Tensor:
    gradient = gradients.get(name)
    if gradient is None:
        raise ValueError(f"{name} has no gradient")
    return gradient


def _random_negatives(num_queries: int, num_passages: int, per_query: int | Literal["all"]) -> Negatives | None:
    """Return a table of random passages in the place of mined ones: as many rows to encode, no mining."""
    per_query = 1 if per_query == "all" else per_query
    if per_query == 0:
        return None
    rows = np.arange(num_queries * per_query)
    ids = (choice(0, 0, rows, 99) * num_passages).astype(np.int64)
    indptr = np.arange(num_queries + 1) * per_query
    return Negatives(indptr, ids, np.zeros(len(ids), np.float32), version=0, manifest={})


if __name__ == "__main__":
    answer(check_here)
