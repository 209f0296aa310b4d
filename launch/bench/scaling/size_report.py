"""What all ranks measured of one size, as one table of numbers."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradcache import StepResult
from launch.bench.flops import loss_flops
from launch.bench.machine import describe
from launch.bench.scaling.counters import most_sent
from launch.bench.scaling.step_counts import sizes_of
from launch.bench.scaling.times import RankTimes, StepTimes, bus_bandwidths, compared, phases_of
from launch.step_phases import HIDDEN
from launch.versions import code_version
from trainer.prepare import Training


@dataclass(frozen=True, kw_only=True)
class RankFigures:
    """What one rank brings."""

    rank: int
    host: str
    ranks_per_node: int
    steps: list[StepTimes]
    tokens: float  # of a step, the median
    encoder_flops: float
    matmul_flops_per_s: float
    peak_gib: float  # that the process, or its GPU, held at most
    sent: tuple[dict[str, int], dict[str, int]]  # by the host's interfaces, before and behind the measured steps
    counted_bytes: float
    formula_bytes: float
    counted_result: StepResult


def report(run: Training, every: Sequence[RankFigures], is_drawn: bool) -> dict[str, Any]:
    """Return the figures of a size. every: rank by rank. is_drawn: whether the negatives were drawn at random."""
    job, first = run.job, every[0]
    times = compared([rank.steps for rank in every])
    result = first.counted_result
    unknown = () if _tells_parameters(run) else ("parameters", HIDDEN)
    options = next(iter(run.tasks.values())).loss
    found = describe(run.world.device)
    at, is_modified = code_version()
    return {
        "ranks": len(every),
        "nodes": len({rank.host for rank in every}),
        "queries": job.batch.queries,
        "queries_per_rank": job.batch.queries // len(every),
        "passages_per_query": round(result.num_passages / result.num_queries, 3),
        "backend": job.parallel.backend if len(every) > 1 else "none",
        "precision": job.precision.encode,
        "travels": result.way.travels,
        "negatives": "drawn at random" if is_drawn else "of the data" if run.data.given is not None else "none",
        "tokens": round(sum(rank.tokens for rank in every)),
        "flops": sum(rank.encoder_flops for rank in every) + loss_flops(options, sizes_of(run, result)),
        "matmul_flops_per_s": statistics.mean(rank.matmul_flops_per_s for rank in every),
        "step_s": [max(seconds) for seconds in zip(*(rank.step_s for rank in times), strict=True)],
        "phases": phases_of(times, unknown),
        "bytes": _bytes(every),
        "bus": bus_bandwidths([rank.steps for rank in every]) if len(every) > 1 else [],
        "ranks_measured": [
            {"rank": r.rank, "host": r.host, "busy_s": t.busy_s, "idle_s": t.idle_s, "peak_gib": round(r.peak_gib, 4)}
            for r, t in zip(every, times, strict=True)
        ],
        **_slowest(every, times),
        "device": found["device"],
        "torch": found["torch"],
        "commit": at,
        "is_modified": is_modified,
    }


def _tells_parameters(run: Training) -> bool:
    """Whether the parameters' synchronisation is known apart: of one rank there is none, of DDP it is noted."""
    return run.world.group is None or run.job.parallel.backend == "ddp"


def _bytes(every: Sequence[RankFigures]) -> dict[str, Any]:
    """Return what a rank sends in a step: counted, by the formula, and as the hosts' interfaces say; means over the ranks."""
    firsts = {rank.host: rank for rank in reversed(every)}  # each host's first rank
    num_steps = len(every[0].steps)
    most = {host: most_sent(*rank.sent) for host, rank in firsts.items()}
    interface = None
    if most and all(most.values()):
        on_host = {host: sum(rank.host == host for rank in every) for host in most}
        sent = [found[1] / on_host[host] / num_steps for host, found in most.items() if found is not None]
        first = most[every[0].host]
        interface = {"name": first[0] if first else "", "sent": statistics.mean(sent)}
    formula = every[0].formula_bytes
    return {"counted": statistics.mean(rank.counted_bytes for rank in every), "formula": formula, "interface": interface}


def _slowest(every: Sequence[RankFigures], times: Sequence[RankTimes]) -> dict[str, Any]:
    """Return the host whose ranks need most time for their own work, and the rank that does."""
    busy: dict[str, list[float]] = {}
    for rank, of_rank in zip(every, times, strict=True):
        busy.setdefault(rank.host, []).append(of_rank.busy_s)
    slowest = max(zip(every, times, strict=True), key=lambda pair: pair[1].busy_s)[0]
    return {"slowest_host": max(busy, key=lambda host: statistics.mean(busy[host])), "slowest_rank": slowest.rank}
