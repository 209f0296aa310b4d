"""What `negpool bench overlap` measures, one case at a time: a side alone on a part of the machine, or both by a division.

The trainer alone on all of it comes first: the miner alone mines the checkpoints that it leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launch.bench.overlap.division import Division, Hardware, units_alone
from launch.counted import counted


@dataclass(frozen=True)
class Case:
    """Who is at work, and with what, in one round."""

    sides: Literal["trainer", "miner", "together"]
    units: int  # cores or GPUs of a side that is alone; of both together: all
    round: int  # from 1
    division: Division | None = None

    @property
    def name(self) -> str:
        """What its folder is called."""
        what = f"{self.sides}-{self.units}" if self.division is None else f"together-{self.division.name.replace(':', '-nice-')}"
        return f"{what}-round-{self.round}"

    def on(self, hardware: Hardware) -> str:
        """Return it in words."""
        if self.division is not None:
            return f"together, {self.division.on(hardware)}"
        return f"{self.sides} alone on {counted(self.units, hardware.unit)}"


def planned(divisions: Sequence[Division], hardware: Hardware, rounds: int) -> list[Case]:
    """Return all cases in their order: forwards in the first round, backwards in the second, and so on.

    What changes slowly, such as a machine that grows warm, then falls on all alike.
    """
    train, mine = units_alone(divisions, hardware)
    found = []
    for number in range(1, rounds + 1):
        cases = [Case("trainer", units, number) for units in train] + [Case("miner", units, number) for units in mine]
        cases += [Case("together", hardware.num_units, number, division) for division in divisions]
        found += cases if number % 2 else cases[::-1]
    return found
