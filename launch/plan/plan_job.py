"""`negpool plan`: what a job would take on other numbers of ranks, and on other hardware, before anyone rents it.

For each number of ranks: memory, operations, messages, seconds of a step and what bounds it, disk, the miner's share. Nothing is
downloaded and nothing started, but for `--device cpu`, which measures this machine.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from launch.fabric import Fabric, built_in_names, find_fabric
from launch.foresee import miner_sizes, steps_of
from launch.jobfile import Jobs
from launch.plan.devices import GIB, HERE, PlannedDevice, find_device
from launch.plan.planned_model import PlannedModel, planned_model
from launch.plan.planned_texts import PlannedTexts, SaidTexts, planned_texts
from launch.plan.rank_memory import RankMemory, rank_memory
from launch.plan.refresh_age import encoding_seconds, ranks_for_age, refresh_of, search_seconds
from launch.plan.step_times import PlannedTimes, encoder_rates, phase_bytes, step_times
from launch.plan.step_work import (
    StepLoad,
    StepWork,
    mean_chunk_tokens,
    messages_of,
    phase_flops,
    place_ranks,
    step_work,
    update_bytes,
)
from launch.plan.storage import PROCESS_BYTES, storage_of
from trainer.budget import CPU_BUDGET
from trainer.encoder.auto import encode_for
from trainer.errors import InputError
from trainer.precision import precision_on
from trainer.tasks import loss_options

SECONDS_OF_HOUR = 3600
NO_LIMIT = 2**60  # bytes


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What the command line asks of a plan."""

    ranks: tuple[int, ...]
    device: str = "h100"  # of the table, or a file, or "cpu": this machine, measured
    fabric: str | None = None  # None: what was measured here, or nothing, for one rank
    mode: Literal["strong", "weak"] = "strong"  # weak: the job's batch is that of the smallest number of ranks
    texts: SaidTexts = field(default_factory=SaidTexts)
    disk_bytes_per_s: float = 1e9  # that all ranks write to
    miner_ranks: int | None = None  # None: as many as section launch says
    age_steps: int | None = None  # that negatives may have at most
    watts: float | None = None  # of a rank

    def __post_init__(self) -> None:
        """Raise InputError for numbers that no run has."""
        if not self.ranks or min(self.ranks) < 1:
            raise InputError(f"--ranks {','.join(map(str, self.ranks))} has no rank in it; expected numbers above 0, as 8,64,512")


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """What a plan rests on, whatever the number of ranks."""

    jobs: Jobs  # with precisions as the device has them
    asked: PlanRequest
    model: PlannedModel
    texts: PlannedTexts
    device: PlannedDevice
    fabric: Fabric | None  # None: there is one rank


def plan_job(jobs: Jobs, asked: PlanRequest) -> dict[str, Any]:
    """Return the plan of a job for each number of ranks; raises InputError for one that nothing can be said of."""
    planned = _settle(jobs, asked)
    model, texts, fabric, train = planned.model, planned.texts, planned.fabric, planned.jobs.train
    sizes = sorted(set(asked.ranks))
    rows = [_plan_size(planned, num_ranks, min(sizes)) for num_ranks in sizes]
    for row in rows:
        rate = row["tokens_of_all"] / row["step_s"] / row["ranks"]
        first = rows[0]["tokens_of_all"] / rows[0]["step_s"] / rows[0]["ranks"]
        row["efficiency"] = rate / first
    first_bad = next((row for row in rows if row["problems"]), None)
    return {
        "run": str(train.run.folder),
        "mode": asked.mode,
        "model": {
            "name": model.name,
            "shape": model.source,
            "parameters": model.num_parameters,
            "trained": model.num_trained,
            "width": model.width,
            "flops_of_token": model.flops.weights,
            "graph_bytes_of_token": model.graph.per_token + model.graph.per_token_and_length * texts.longest,
        },
        "texts": texts.as_json(),
        "device": asdict(planned.device),
        "fabric": None if fabric is None else {"name": fabric.name, "hardware": fabric.hardware, "source": fabric.source},
        "precision": asdict(train.precision),
        "backend": train.parallel.backend,
        "sizes": rows,
        "first_that_cannot_run": None if first_bad is None else {k: first_bad[k] for k in ("ranks", "problems")},
    }


def _settle(jobs: Jobs, asked: PlanRequest) -> _Planned:
    """Return all that does not depend on the number of ranks."""
    device_type = "cpu" if asked.device == HERE else find_device(asked.device).type
    has_bf16 = device_type == "cuda"
    train = replace(jobs.train, precision=precision_on(jobs.train.precision, has_bf16))
    jobs = replace(jobs, train=train, mine=replace(jobs.mine, encode=encode_for(jobs.mine.encode, has_bf16, has_bf16)))
    model = planned_model(train.model, train.precision.encode, device_type)
    texts = planned_texts(jobs, model.traits, asked.texts)
    fabric = None if asked.fabric is None else find_fabric(asked.fabric)
    if asked.device == HERE:
        from launch.plan.measured_device import measure_here

        count = _ranks_here(asked.ranks)
        limit = CPU_BUDGET.chunk_tokens if train.chunk.tokens == "auto" else train.chunk.tokens
        tokens = mean_chunk_tokens(texts, max(1, train.batch.queries // count), _per_query(jobs), limit)
        device, found = measure_here(train.model, train.precision.encode, texts.passage_tokens, tokens, count)
        fabric = fabric or found
    else:
        device = find_device(asked.device)
    if fabric is None and max(asked.ranks) > 1:
        known = ", ".join(built_in_names())
        raise InputError(
            f"{max(asked.ranks)} ranks send each other something; name what joins them by --fabric: {known}, or a file"
        )
    device = device if asked.watts is None else replace(device, watts=asked.watts)
    return _Planned(jobs=jobs, asked=asked, model=model, texts=texts, device=device, fabric=fabric)


def _per_query(jobs: Jobs) -> int:
    """Return the hard negatives of a query in a step."""
    asked = jobs.train.negatives.per_query
    return jobs.mine.sample.num_negatives if asked == "all" else asked


def _ranks_here(ranks: Sequence[int]) -> int:
    """Return how many ranks are measured at once: as many as are planned, if there are cores for them."""
    return max((count for count in ranks if count <= len(os.sched_getaffinity(0))), default=1)


def _plan_size(planned: _Planned, num_ranks: int, fewest: int) -> dict[str, Any]:
    """Return the plan of one number of ranks. fewest: of all sizes, the smallest."""
    train, asked, model, texts, device = planned.jobs.train, planned.asked, planned.model, planned.texts, planned.device
    queries = train.batch.queries * (num_ranks if asked.mode == "weak" else fewest) // fewest
    if queries < num_ranks:
        raise InputError(
            f"batch.queries={queries} is less than the {num_ranks} ranks; every rank needs a query, so set batch.queries higher "
            "or plan fewer ranks"
        )
    placement = place_ranks(train, num_ranks, num_ranks if planned.fabric is None else planned.fabric.ranks_per_node)
    work = step_work(train, model, texts, device, num_ranks, queries, _per_query(planned.jobs))
    memory = rank_memory(train, model, texts, device, work, placement.num_shards)
    options = loss_options(train.loss, train.precision)
    scores = max(1.0, 4.0 * work.queries * work.sizes.passages_here)
    flops = phase_flops(work, model, options, memory.chunks, min(1.0, memory.items.kept_scores / scores))
    messages = messages_of(work, train, model, device, memory.chunks)
    load = StepLoad(flops=flops, messages=messages, update_bytes=update_bytes(model, placement.num_shards))
    times = step_times(train, model, device, planned.fabric, work, memory.chunks, load)
    row = _step_row(work, memory, times, flops, phase_bytes(messages, num_ranks), device, train.precision.encode)
    miner = _miner_bytes(planned) if placement.num_nodes == 1 else 0
    kept = storage_of(train, model, texts, placement, device.type, asked.disk_bytes_per_s, times.step_s, miner)
    found = {"storage": asdict(kept), "nodes": placement.num_nodes, "problems": list(memory.problems)}
    return row | _run_row(planned, work, times) | found


def _miner_bytes(planned: _Planned) -> int:
    """Return what the miner's ranks hold in the memory of a host that they share with trainers: its own plan, without a limit."""
    from mining.memory import plan_memory

    jobs, texts, device = planned.jobs, planned.texts, planned.device
    if texts.num_queries is None or texts.num_passages is None or jobs.train.negatives.per_query == 0:
        return 0
    ranks = planned.asked.miner_ranks or jobs.launch.mine_ranks
    sizes = miner_sizes(jobs, texts.num_queries, texts.num_passages, planned.model.width, ranks, device.type)
    return ranks * plan_memory(sizes, PROCESS_BYTES[device.type], NO_LIMIT).total


def _step_row(
    work: StepWork,
    memory: RankMemory,
    times: PlannedTimes,
    flops: dict[str, float],
    sent: dict[str, float],
    device: PlannedDevice,
    encode: str,
) -> dict[str, Any]:
    """Return the step of one number of ranks, as JSON has it."""
    items = {name: size / GIB for name, size in vars(memory.items).items()}
    items |= {"gathered_layers": memory.gathered_bytes / GIB, "saved": memory.saved_bytes / GIB}
    items |= {"process": device.process_gib}
    return {
        "ranks": work.num_ranks,
        "queries": work.queries,
        "queries_per_rank": work.queries_here,
        "passages": work.passages,
        "tokens": work.tokens,
        "tokens_of_all": work.tokens_of_all,
        "travels": work.way.travels,
        "chunk_tokens": memory.chunks.limit,
        "share_padding": 1 - work.tokens / memory.chunks.tokens,
        "chunks": memory.chunks.num,
        "graphs_kept": memory.chunks.num_kept,
        "memory_gib": items,
        "memory_total_gib": sum(items.values()),
        "memory_limit_gib": memory.limit_bytes / GIB + device.process_gib,
        "flops": flops,
        "bytes": sent,
        "phases": times.phases,
        "parameters_hidden_s": times.hidden_s,
        "step_s": times.step_s,
        "step_without_overlap_s": times.without_overlap_s,
        "bottleneck": times.bottleneck,
        "share_of_matmul_rate": sum(flops.values()) / times.step_s / device.rate(encode),
        "tokens_per_s": work.tokens_of_all / times.step_s,
    }


def _run_row(planned: _Planned, work: StepWork, times: PlannedTimes) -> dict[str, Any]:
    """Return steps, evaluations, refreshes, hours and energy, as far as the data's size is known."""
    train, model, texts, device = planned.jobs.train, planned.model, planned.texts, planned.device
    found = dict[str, Any]()
    steps = steps_of(train, texts.num_queries, work.queries)
    if texts.num_passages is not None:
        forward_rate, _ = encoder_rates(train, device)
        flops = model.forward_flops(1.0, texts.passage_tokens)
        found["evaluation_s"] = encoding_seconds(texts.num_passages * texts.passage_tokens, flops, forward_rate, work.num_ranks)
        if texts.num_queries is not None:
            found |= _refresh_row(planned, forward_rate, times.step_s)
    if steps is not None:
        hours = steps * times.step_s * work.num_ranks / SECONDS_OF_HOUR
        found |= {"steps": steps, "run_s": steps * times.step_s, "rank_hours": hours}
        if device.watts is not None:
            found["energy_kwh"] = hours * device.watts / 1000
    return found


def _refresh_row(planned: _Planned, forward_rate: float, step_s: float) -> dict[str, Any]:
    """Return a refresh by the miner's ranks, and the age of what it finds. Its exact search is a product like the loss's."""
    jobs, asked, model, texts, device = planned.jobs, planned.asked, planned.model, planned.texts, planned.device
    assert texts.num_queries is not None and texts.num_passages is not None
    ranks, every = asked.miner_ranks or jobs.launch.mine_ranks, jobs.train.checkpoint.every_steps
    of_one = 0.0
    sides = ((texts.num_queries, texts.query_tokens), (texts.num_passages, texts.passage_tokens))
    for count, length in sides:
        of_one += encoding_seconds(count * length, model.forward_flops(1.0, length), forward_rate, 1)
    products = device.rate(jobs.mine.encode.dtype) * device.loss_share
    of_one += search_seconds(texts.num_queries, texts.num_passages, model.width, products, 1)
    found: dict[str, Any] = {"refresh": asdict(refresh_of(of_one / ranks, step_s, every)) | {"ranks": ranks}}
    if asked.age_steps is not None:
        found["refresh"]["ranks_for_age"] = ranks_for_age(of_one, step_s, every, asked.age_steps)
    return found
