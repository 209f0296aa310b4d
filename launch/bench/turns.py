"""Several ways to do the same work, measured in turn: rounds differ more than turns of one round do."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.bench.machine import freed_at_once, measured, seconds_of
from launch.output import messages
from trainer.world import World


@dataclass
class Turns:
    """What the turns of one way took."""

    peak_gib: float
    seconds: list[float] = field(default_factory=list)


def take_turns(ways: Mapping[str, Callable[[], Any]], rounds: int, world: World) -> dict[str, Turns]:
    """Return what every way took: the slowest rank's time, the largest rank's memory above what is held. Collective.

    A first round measures memory, freed blocks returned at once, and is not timed: in it libraries load and kernels are compiled.
    """
    found: dict[str, Turns] = {}
    for name, work in ways.items():
        with freed_at_once(), measured(world.device) as cost:
            work()
        found[name] = Turns(world.all_max([int(cost.peak_gib * 2**20)])[0] / 2**20)
    for number in range(rounds):
        for name, work in ways.items():
            world.barrier()
            seconds = world.all_max([int(seconds_of(work, world.device) * 1e9)])[0] / 1e9
            found[name].seconds.append(seconds)
            if world.speaks:
                messages().print(f"[dim]round {number + 1}: {name}: {seconds:.3g} s[/dim]")
    return found


def compared(found: Mapping[str, Turns], base: str, wanted: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return medians, and the median of each round's ratio to the base; wanted: ratios set as goals."""
    rows = {}
    for name, turns in found.items():
        ratio = statistics.median(a / b for a, b in zip(turns.seconds, found[base].seconds, strict=True))
        rows[name] = {
            "seconds": round(statistics.median(turns.seconds), 5),
            "ratio": round(ratio, 3),
            "wanted": wanted.get(name),
            "peak_gib": round(turns.peak_gib, 3),
        }
    return rows
