"""`negpool bench fabric`: what each collective takes by the size of its message, and the two constants that say it in short.

Constants are fitted on every other size, the largest among them, and checked on the others. On several nodes the ranks of a node
are measured among themselves, all nodes at once, then rings with one rank of each node, all of them at once, and last all ranks
together, which the constants have to foretell. The collectives are those of a step: gloo's on CPUs, NCCL's on GPUs.
"""

import datetime
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import scipy.optimize
import torch
import torch.distributed as dist

from gradcache.gates import all_gather, reduce_scatter
from launch.bench.machine import describe, seconds_of
from launch.counted import counted
from launch.fabric import COLLECTIVES, MEASURED, Fabric, Wire, hops, sent_bytes
from launch.ranks import answer
from trainer.errors import InputError
from trainer.world import World, join_world

SIZES = tuple(1024 * 4**power for power in range(9))  # bytes of a message, up to 64 MiB
LONG_S = 1.0  # a call beyond it is the last size of its collective: the next one takes four times as long
TURNS_S = 0.2  # for the turns of one size, where they are short
MOST_ROUNDS = 20
INSIDE, BETWEEN, TOGETHER = "inside", "between", "together"  # in a node, of nodes, all ranks


def bench_fabric(rounds: int, max_mib: int, name: str) -> dict[str, Any] | None:
    """Return the fabric and what it rests on, on rank 0; None elsewhere. Collective.

    rounds: at least as many turns of each size. max_mib: of the largest message. name: of the fabric.
    """
    world = join_world()
    try:
        found = measure(world, [size for size in SIZES if size <= max_mib * 2**20], rounds, name)
        return found if world.speaks else None
    finally:
        world.leave()


def measure(world: World, sizes: Sequence[int], rounds: int, name: str) -> dict[str, Any]:
    """Return the fabric, the rows it rests on, and the largest error where nothing was fitted. Collective.

    Raises InputError, on every rank alike, for a single rank, and for nodes with different numbers of ranks.
    """
    _refuse(world)
    backend = dist.get_backend(world.group)
    all_reduce: Literal["ring", "tree"] = "tree" if backend == "nccl" else "ring"
    wires: dict[str, dict[str, Wire]] = {INSIDE: {}, BETWEEN: {}}
    rows: list[dict[str, Any]] = []
    for part, ranks, group in _parts(world):
        for collective in COLLECTIVES:
            times = times_of(world, ranks, group, collective, sizes, rounds)
            fitted = {} if part == TOGETHER else dict(list(times.items())[::-2])  # the largest one is among them
            if fitted:
                wires[part][collective] = fit(collective, fitted, len(ranks), part == BETWEEN, all_reduce)
            rows += [
                {"part": part, "collective": collective, "ranks": len(ranks), "num_bytes": size, "median_s": seconds}
                | {"is_held_out": size not in fitted}
                for size, seconds in times.items()
            ]
    fabric = Fabric(
        name=name,
        ranks_per_node=world.ranks_per_node,
        hardware=f"{describe(world.device)['device']}, {counted(world.num_ranks, 'rank')}, {backend}",
        date=datetime.date.today().isoformat(),
        source=MEASURED,
        inside=wires[INSIDE],
        between=wires[BETWEEN],
        all_reduce=all_reduce,
    )
    return checked(fabric, rows) | {"ranks": world.num_ranks, "backend": backend, "rounds": rounds} | describe(world.device)


def _refuse(world: World) -> None:
    if world.num_ranks < 2:
        raise InputError("a fabric is measured on 2 ranks or more; set --ranks higher, or start ranks by torchrun or srun")
    most, least = world.all_max([world.ranks_per_node, -world.ranks_per_node])
    if most != -least or world.num_ranks % most:
        raise InputError(
            f"the nodes have from {-least} to {most} ranks, and a fabric is measured on nodes with as many; start as many on each"
        )


def _parts(world: World) -> Iterator[tuple[str, list[int], dist.ProcessGroup]]:
    """Yield what is measured: the part's name, the ranks of this rank's group, and the group. Collective."""
    of_node, num_ranks = world.ranks_per_node, world.num_ranks
    nodes = [list(range(first, first + of_node)) for first in range(0, num_ranks, of_node)]
    rings = [list(range(first, num_ranks, of_node)) for first in range(of_node)]
    assert world.group is not None
    for part, groups in (INSIDE, nodes), (BETWEEN, rings), (TOGETHER, [list(range(num_ranks))]):
        own = next(ranks for ranks in groups if world.rank in ranks)
        if part == TOGETHER and 1 < of_node < num_ranks:
            yield part, own, world.group
        elif part != TOGETHER and len(own) > 1:
            yield part, own, dist.new_subgroups_by_enumeration(groups)[0]


def times_of(
    world: World,
    ranks: list[int],
    group: dist.ProcessGroup,
    collective: str,
    sizes: Sequence[int],
    rounds: int,
    middle: Callable[[Iterable[float]], float] = statistics.median,
) -> dict[int, float]:
    """Return the median time of each size of message in bytes; the slowest group's, if several are at work. Collective.

    Waiting for others does not count: of each turn's ranks the one counts that came last, and waited least.
    middle: what is made of the turns.
    """
    found: dict[int, float] = {}
    for size in sizes:
        work, num_bytes = made_call(collective, size, len(ranks), group, world.device)
        work()  # connections are made, kernels loaded
        first_s = _agreed(world, seconds_of(work, world.device))
        turns = max(rounds, min(MOST_ROUNDS, int(TURNS_S / first_s)))
        seconds = []
        for _ in range(turns):
            world.barrier()
            seconds.append(seconds_of(work, world.device))
        of_ranks = world.gather_objects((tuple(ranks), seconds))
        found[num_bytes] = world.broadcast(_of_turns(of_ranks, middle) if world.speaks else None)
        if first_s > LONG_S:
            break
    return found


def _agreed(world: World, seconds: float) -> float:
    return max(1, world.all_max([int(seconds * 1e9)])[0]) / 1e9


def _of_turns(of_ranks: Sequence[tuple[tuple[int, ...], list[float]]], middle: Callable[[Iterable[float]], float]) -> float:
    """Return the middle over the turns of the slowest group's time, which is that of the group's fastest rank."""
    groups: dict[tuple[int, ...], list[list[float]]] = {}
    for ranks, seconds in of_ranks:
        groups.setdefault(ranks, []).append(seconds)
    of_groups = [[min(turn) for turn in zip(*times, strict=True)] for times in groups.values()]
    return middle(max(turn) for turn in zip(*of_groups, strict=True))


def made_call(
    collective: str, size: int, num_ranks: int, group: dist.ProcessGroup, device: torch.device
) -> tuple[Callable[[], Any], int]:
    """Return a call of a collective, and the bytes of its message: `size`, or what more the ranks need to share it out evenly."""
    part = -(-size // (4 * num_ranks))
    whole, own = torch.zeros(num_ranks * part, device=device), torch.zeros(part, device=device)
    other = torch.zeros_like(whole) if collective == "all_to_all" else own
    calls: Mapping[str, Callable[[], Any]] = {
        "all_gather": lambda: all_gather(whole, own, group=group),
        "reduce_scatter": lambda: reduce_scatter(own, whole, group=group),
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
    }
    return calls[collective], whole.nbytes


def fit(collective: str, times: Mapping[int, float], num_ranks: int, is_between: bool, all_reduce: str = "ring") -> Wire:
    """Return the constants that come nearest to the times of a group's messages, by the squares of relative errors.

    Small and large messages count alike by that. times: seconds by bytes. is_between: each rank of the group is in another node.
    Raises InputError where the times contradict the model.
    """
    staying, leaving = hops(collective, num_ranks, 1 if is_between else num_ranks, all_reduce)
    terms = [[(staying + leaving) / s, sent_bytes(collective, size, num_ranks) / s] for size, s in times.items()]
    (latency_s, s_per_byte), _ = scipy.optimize.nnls(terms, [1.0] * len(terms))
    if not latency_s or not s_per_byte:
        raise InputError(
            f"the times of {collective} do not grow with the message as a latency and a bandwidth would have them; measure again "
            "while nothing else runs, with higher --rounds or --max-mib"
        )
    return Wire(latency_s=float(latency_s), bytes_per_s=float(1 / s_per_byte))


def checked(fabric: Fabric, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fabric, the rows with what it says of each, and the largest error of those that nothing was fitted on."""
    for row in rows:
        row["fitted_s"] = _said(fabric, row)
        row["error"] = row["fitted_s"] / row["median_s"] - 1
        row["bytes_per_s"] = sent_bytes(row["collective"], row["num_bytes"], row["ranks"]) / row["median_s"]
    held_out = [abs(row["error"]) for row in rows if row["is_held_out"]]
    return {"fabric": asdict(fabric), "rows": rows, "largest_held_out_error": max(held_out, default=None)}


def _said(fabric: Fabric, row: dict[str, Any]) -> float:
    """Return what the fabric says of a row; of rings between nodes as if a node had one rank."""
    own = Fabric(**asdict(fabric) | {"ranks_per_node": 1}) if row["part"] == BETWEEN else fabric
    return own.seconds(row["collective"], row["num_bytes"], row["ranks"])


if __name__ == "__main__":
    answer(bench_fabric)
