"""`negpool bench emulate`: what a step takes of one rank among many, up to thousands, on this one device.

The rank is real: a job's model, texts and settings, its loss at the full size of all ranks. The others are this rank mirrored
(mirrored.py). Measured are memory above what lasts from step to step, beside the plan of `trainer/step_memory.py`, and seconds by
phase; what is not measured is communication, for there is none. Hard negatives are drawn at random from the corpus, each as far
as possible once: their number is what counts.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from gradcache import Batch, StepResult, Temperature, cached_step
from gradcache.budget import BACKWARD_SHARE, measure_graphs
from gradcache.gates import quiet_torch
from gradcache.loss_memory import LossSizes
from gradcache.plan import plan_encoding
from gradcache.spans import span
from launch.bench.machine import describe, freed_at_once, start_peak
from launch.bench.mirrored import Mirrors, fake_world
from launch.bench.scaling.random_negatives import drawn_negatives
from launch.bench.step_costs import OTHERS, StepCosts
from launch.bench.turns import free_memory
from launch.counted import counted
from launch.jobfile import Jobs, Override, read_job
from trainer.backends import parallelize
from trainer.budget import RunBudget, find_budget
from trainer.data.collate import RowEncoder, Wants, collate
from trainer.data.datasets import open_data
from trainer.data.sampler import global_batch
from trainer.encoder.auto import takes_bf16
from trainer.encoder.model import load_encoder
from trainer.encoder.packed import packs
from trainer.errors import InputError
from trainer.job import TrainJob
from trainer.parallel import Parallel
from trainer.precision import DTYPES, encode_in, precision_on, set_tf32
from trainer.prepare import tokenized
from trainer.step_memory import GIB, StepMemory, model_memory, step_memory
from trainer.tasks import loss_options
from trainer.world import World, keep_freed_memory

BACKENDS = ("ddp", "fsdp2")  # DeepSpeed makes groups of its own
OF_LOSS = ("control", "gather", "masks", "statistics", "loss", "reduce_scatter")  # phases
USABLE = 0.9  # of the memory that is free


def bench_emulate(
    job: Path, overrides: Sequence[Override], ranks: Sequence[int], queries_per_rank: int | None, rounds: int
) -> dict[str, Any]:
    """Return what each number of ranks takes of one of them.

    queries_per_rank: None: `batch.queries` is of all ranks, whatever their number. Raises InputError for what cannot be measured
    here, before anything is.
    """
    jobs = read_job(job, overrides)
    counts = {num_ranks: queries_of_rank(jobs.train, num_ranks, queries_per_rank) for num_ranks in ranks}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quiet_torch()
    keep_freed_memory()
    bench = _Bench(jobs, device, max(counts.values()))
    plans = {num_ranks: bench.plan(num_ranks, queries) for num_ranks, queries in counts.items()}
    for num_ranks, plan in plans.items():
        refuse_too_large(plan, num_ranks, counts[num_ranks], bench.room_bytes())
    sizes = [bench.measure(num_ranks, queries, plans[num_ranks], rounds) for num_ranks, queries in counts.items()]
    return {
        **describe(device),
        "job": str(job),
        "model": jobs.train.model.name,
        "backend": jobs.train.parallel.backend,
        "precision": bench.job.precision.encode,
        "hard_negatives": bench.per_query,
        "width": bench.encoder.width,
        "rounds": rounds,
        "mode": "strong" if queries_per_rank is None else "weak",
        "sizes": sizes,
    }


def read_ranks(words: str) -> list[int]:
    """Return numbers of ranks from their list; raises InputError for what is none."""
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise InputError(f"--ranks {words} is no list of numbers; expected one as 64,512,4096") from None


def queries_of_rank(job: TrainJob, num_ranks: int, queries_per_rank: int | None) -> int:
    """Return the queries of a rank; raises InputError for a number of ranks that cannot be emulated."""
    if job.parallel.backend not in BACKENDS:
        raise InputError(
            f'parallel.backend="{job.parallel.backend}" cannot be emulated, because DeepSpeed makes groups of its own; set '
            "parallel.backend to ddp or fsdp2"
        )
    if num_ranks < 2:
        raise InputError(f"--ranks {num_ranks} leaves nothing to emulate; expected 2 or more")
    if queries_per_rank is not None:
        return queries_per_rank
    if job.batch.queries % num_ranks:
        what = "fewer than" if job.batch.queries < num_ranks else "not divisible by"
        raise InputError(
            f"batch.queries={job.batch.queries} is {what} {num_ranks:,} ranks; set it to a multiple, or --queries-per-rank"
        )
    return job.batch.queries // num_ranks


def refuse_too_large(plan: StepMemory, num_ranks: int, queries: int, room_bytes: float) -> None:
    """Raise InputError where a step is foreseen to take more than there is for it."""
    if plan.total > room_bytes:
        items = plan.in_gib()
        largest = max(items, key=items.__getitem__)
        raise InputError(
            f"one of {num_ranks:,} ranks with {counted(queries, 'query')} each would hold {plan.total / GIB:.1f} GiB, "
            f"{items[largest]:.1f} of them {largest}, and {room_bytes / GIB:.1f} GiB are free for it here; set "
            "--queries-per-rank, batch.queries or --ranks lower"
        )


class _Bench:
    """A job's model and texts, and one rank's steps with them."""

    def __init__(self, jobs: Jobs, device: torch.device, most_queries: int):
        self.device = device
        self.job = replace(jobs.train, precision=precision_on(jobs.train.precision, takes_bf16(device)))
        set_tf32(self.job.precision)
        data = open_data(self.job.data, self.job.sources)
        self.encoder, tokenizer, traits = load_encoder(self.job.model)
        self.job.loss.check_model(self.encoder.width)
        self.dataset = tokenized(self.job, data, tokenizer, traits)
        if self.dataset.num_queries < most_queries:
            raise InputError(
                f"{data.path} has {counted(self.dataset.num_queries, 'training query')}, and a rank would have {most_queries}; "
                "set --queries-per-rank or batch.queries lower"
            )
        given = jobs.train.negatives.per_query
        self.per_query = jobs.mine.sample.num_negatives if given == "all" else given
        self.loss = loss_options(self.job.loss, self.job.precision)
        if isinstance(self.loss.objective, torch.nn.Module):
            self.loss.objective.to(device)

    def room_bytes(self) -> float:
        """Return the bytes that are free for a step, this process's model counted in."""
        weights = sum(parameter.nbytes for parameter in self.encoder.parameters())
        if self.device.type == "cuda":
            return USABLE * torch.cuda.mem_get_info(self.device)[0]
        return USABLE * psutil.virtual_memory().available + weights

    def plan(self, num_ranks: int, queries: int) -> StepMemory:
        """Return what one rank is foreseen to hold, graphs as the encoder makes them here."""
        batch = self.batch(queries, self._rows_by(self.encoder.to(self.device)))
        limit = self.room_bytes() if self.job.chunk.memory_gib is None else self.job.chunk.memory_gib * GIB
        sizes = LossSizes(
            queries=batch.num_queries * num_ranks,
            passages=batch.num_passages * num_ranks,
            width=self.encoder.width,
            num_ranks=num_ranks,
            is_even=True,
        )
        model = model_memory(self.encoder, self.job, num_ranks, self.device.type, is_first=False)
        memory = step_memory(model, self.loss, sizes, self.device, limit)
        world = World(0, num_ranks, self.device, None, None)
        return with_graphs(memory, batch, find_budget(self.job, self.loss, batch, self.encoder, world))

    def batch(self, queries: int, rows: RowEncoder) -> Batch:
        """Return the first batch of so many queries, with their hard negatives."""
        query_n = global_batch(self.job.run.seed, 0, self.dataset.num_queries, queries)
        return collate(
            self.dataset,
            drawn_negatives(self.dataset, query_n, self.per_query),
            query_n,
            rows,
            per_query=self.per_query,
            seed=self.job.run.seed,
            step=0,
            wants=Wants.of(self.loss.objective),
        )

    def measure(self, num_ranks: int, queries: int, plan: StepMemory, rounds: int) -> dict[str, Any]:
        """Return what one of so many ranks takes."""
        with fake_world(num_ranks, self.device) as world:
            encoder, *_ = load_encoder(self.job.model)
            parallel = parallelize(encoder, world, self.job.parallel, self.job.optim, DTYPES[self.job.precision.encode])
            batch = self.batch(queries, self._rows_by(parallel.module))
            step = _Step(self, world, parallel, batch, find_budget(self.job, self.loss, batch, encoder, world))
            result, _ = step.take()  # libraries load, the moments come to be
            held = start_peak(self.device)
            with freed_at_once():
                _, costs = step.take(trims=True)
            peaks = {name: max(0, peak - held) for name, peak in costs.peaks.items() if name != OTHERS}
            taken = [step.take()[1].seconds for _ in range(rounds)]
            size = _described(result, batch, num_ranks)
        del encoder, parallel, batch, step
        free_memory(self.device)
        seconds = {name: statistics.median(each[name] for each in taken) for name in taken[0] if name != OTHERS}
        return size | {
            "seconds": {name: round(value, 6) for name, value in seconds.items()},
            "own_s": round(sum(seconds.values()), 6),
            "peaks_gib": {name: round(peak / GIB, 4) for name, peak in peaks.items()},
            **against_plan(peaks, plan),
        }

    def _rows_by(self, module: torch.nn.Module) -> RowEncoder:
        encode = encode_in(module, self.job.precision, self.device)
        is_packed = packs(self.encoder, self.device, DTYPES[self.job.precision.encode])
        return RowEncoder(encode, self.device, self.encoder.has_two_towers, is_packed)


@dataclass(frozen=True)
class _Step:
    """A step of one rank and its update."""

    bench: _Bench
    world: World
    parallel: Parallel
    batch: Batch
    budget: RunBudget

    def take(self, trims: bool = False) -> tuple[StepResult, StepCosts]:
        """Take the step."""
        bench, costs = self.bench, StepCosts(self.world.device, trims)
        loss = bench.job.loss
        temperature = Temperature(loss.temperature, loss.learn_temperature, loss.min_temperature).to(self.world.device)
        with costs.of_step(), Mirrors(self.world.rank, self.world.num_ranks, costs).in_place():
            result = cached_step(
                self.batch,
                loss=bench.loss,
                temperature=temperature,
                sync=self.parallel.sync,
                group=self.world.group,
                chunk_tokens=self.budget.chunk_tokens,
                keep_graphs=self.budget.keep_graphs,
                seed=bench.job.run.seed,
                step=0,
            )
            with span("update"):
                self.parallel.update(torch.amp.GradScaler(self.world.device.type, enabled=False))
        return result, costs


def _described(result: StepResult, batch: Batch, num_ranks: int) -> dict[str, Any]:
    """Return how large a step is, and what its loss says of it."""
    return {
        "ranks": num_ranks,
        "queries": batch.num_queries * num_ranks,
        "queries_per_rank": batch.num_queries,
        "passages_per_rank": batch.num_passages,
        "travels": result.way.travels,
        "loss": round(result.loss, 4),
        "share_masked": result.share_masked,
    }


def with_graphs(memory: StepMemory, batch: Batch, budget: RunBudget) -> StepMemory:
    """Return a plan with the bytes of the graphs that a budget holds at once, from the encoder's own."""
    costs = [(measure_graphs(tower), int(tower.lengths.max())) for tower in batch.towers if len(tower.lengths)]
    cost, _ = max(costs, key=lambda found: found[0].of(budget.chunk_tokens, found[1]))
    chunks = plan_encoding(batch.towers, budget.chunk_tokens, 0, 0, 0).chunks
    kept = len(chunks) if budget.keep_graphs == "all" else min(budget.keep_graphs, len(chunks))
    sizes = [cost.of_chunk(chunk) for chunk in chunks]
    backward = (BACKWARD_SHARE - 1) * max(sizes) if kept == len(chunks) else BACKWARD_SHARE * max(sizes)
    return replace(memory, chunk=int(backward), kept_graphs=int(sum(sizes[len(sizes) - kept :])))


def against_plan(peaks: dict[str, int], plan: StepMemory) -> dict[str, Any]:
    """Return the peaks of a step, of its loss and of its second encoding beside the plan of what lives in each and does not last.

    The trainer's plan counts all at once; the loss and the second encoding come one after the other.
    """
    of_loss = plan.embeddings + plan.tile + plan.kept_scores + plan.kept_graphs
    of_graphs = plan.gradients + plan.chunk + plan.kept_graphs
    parts = {
        "step": (max(peaks.values()), plan.total - plan.lasting),
        "loss": (max(peaks[name] for name in OF_LOSS if name in peaks), of_loss),
        "encode_again": (peaks["encode_again"], of_graphs),
    }
    found = {}
    for name, (peak, planned) in parts.items():
        peak_gib, plan_gib, ratio = round(peak / GIB, 4), round(planned / GIB, 4), round(planned / max(1, peak), 3)
        found[name] = {"peak_gib": peak_gib, "plan_gib": plan_gib, "ratio": ratio}
    return {"plan_gib": plan.in_gib(), "memory": found}
