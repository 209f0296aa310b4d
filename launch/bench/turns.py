"""Several ways to do the same work, measured in turn: rounds differ more than turns of one round do."""

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from launch.bench.machine import freed_at_once, measured, seconds_of
from launch.output import messages
from trainer.world import World

TRIAL_TURNS = 2


@dataclass
class Turns:
    """What the turns of one way took."""

    peak_gib: float
    seconds: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def take_turns(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    world: World,
    before: Callable[[], None] = lambda: None,
    held: int | None = None,
) -> dict[str, Turns]:
    """Return what every way took: the slowest rank's time, the largest rank's memory above what is held. Collective.

    Every second round has the opposite order, so that a machine that slows down slows everybody down alike.
    A first round measures memory, freed blocks returned at once, and is not timed: in it libraries load and kernels are compiled.
    Of one process a way that does not fit into a GPU's memory is left out, and the others go on.
    before: called before each turn. held: bytes above which memory counts; None: what is held at the start of a turn.
    """
    found: dict[str, Turns] = {}
    for name, work in ways.items():
        before()
        with freed_at_once(), measured(world.device, held) as cost:
            does_fit = fits(work, world)
        if not does_fit:
            _say(world, f"{name}: out of memory")
            continue
        found[name] = Turns(world.all_max([int(cost.peak_gib * 2**20)])[0] / 2**20)
        _say(world, f"memory: {name}: {found[name].peak_gib:.2f} GiB")
    for number in range(rounds):
        for name in list(found)[:: -1 if number % 2 else 1]:
            before()
            world.barrier()
            taken = seconds_if_it_fits(ways[name], world)
            if taken is None:
                _say(world, f"{name}: out of memory")
                del found[name]
                continue
            seconds = world.all_max([int(taken * 1e9)])[0] / 1e9
            found[name].seconds.append(seconds)
            _say(world, f"round {number + 1}: {name}: {seconds:.3g} s")
    return found


def try_settings(
    ways: Mapping[str, Callable[[], Any]], world: World, before: Callable[[], None] = lambda: None
) -> dict[str, float | None]:
    """Return the shorter of two turns of each way, None where it does not fit into memory. Collective.

    For a choice among settings: what else the machine does makes a turn longer, and never shorter.
    """
    turns = take_turns(ways, TRIAL_TURNS, world, before)
    return {name: round(min(turns[name].seconds), 4) if name in turns else None for name in ways}


def fits(work: Callable[[], Any], world: World) -> bool:
    """Do the work, and return whether it fitted into memory; what it held is free behind it. On several ranks it must fit."""
    try:
        work()
        return True
    except torch.OutOfMemoryError:
        if world.group is not None:  # the others wait for this one
            raise
    free_memory(world.device)  # outside of the except block, where the traceback holds what the work held
    return False


def seconds_if_it_fits(work: Callable[[], Any], world: World) -> float | None:
    """Return how long the work takes; None: it does not fit into memory."""
    taken: list[float] = []
    return taken[0] if fits(lambda: taken.append(seconds_of(work, world.device)), world) else None


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compared(found: Mapping[str, Turns], base: str, wanted: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return medians, and the median of each round's ratio to the base; wanted: ratios set as goals."""
    rows = {}
    for name, turns in found.items():
        ratio = statistics.median(a / b for a, b in zip(turns.seconds, found[base].seconds, strict=True))
        rows[name] = {
            "seconds": round(turns.median_s, 5),
            "ratio": round(ratio, 3),
            "wanted": wanted.get(name),
            "peak_gib": round(turns.peak_gib, 3),
        }
    return rows


def speeds(turns: Mapping[str, Turns], wanted: Mapping[str, float], work: float, unit_name: str) -> dict[str, Any]:
    """Return everybody's median time and rate, and our rate over theirs, the median of the rounds, beside the wanted one."""
    sides = {
        name: {"seconds": row["seconds"], "ratio": row["ratio"], unit_name: round(work / row["seconds"], 1)}
        for name, row in compared(turns, "ours", {}).items()
    }
    ratios = {name: {"found": sides[name]["ratio"], "wanted": wanted[name]} for name in sides if name in wanted}
    return {"sides": sides, "our_rate_over": ratios}


def share_of_rate(flops_per_s: float, rate: float, precision: str) -> dict[str, Any]:
    """Return which share of the rate of a large product was reached."""
    return {
        "precision": precision,
        "matmul_gflops": round(rate / 1e9, 1),
        "share_of_matmul_rate": round(flops_per_s / rate, 3),
    }


def _say(world: World, sentence: str) -> None:
    if world.speaks:
        messages().print(f"[dim]{sentence}[/dim]")
