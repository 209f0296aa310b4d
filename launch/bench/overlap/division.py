"""How a machine is divided between trainer and miner, as `negpool bench overlap --shares` says it.

On cores a share is a number of cores that only the miner uses, or `all`: both sides use all, and the system divides their time;
`all:10` is that with the miner's niceness set to 10. On several GPUs it is a number of GPUs that only the miner uses; on one it
is the miner's share of the memory, as 0.3, and the driver divides the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.counted import counted
from launch.shares import LaunchSettings
from trainer.errors import InputError

ALL = "all"
NICE = 10  # niceness beside the system's own division, where nobody says which shares are measured
MOST_NICE = 19


@dataclass(frozen=True)
class Hardware:
    """What both sides share: cores, or where there are any, GPUs."""

    cores: int
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them

    @property
    def unit(self) -> str:
        return "GPU" if self.gpus else "core"

    @property
    def num_units(self) -> int:
        return len(self.gpus) or self.cores


@dataclass(frozen=True)
class Division:
    """What each side may use."""

    name: str  # as --shares has it
    train_units: int  # cores or GPUs
    mine_units: int
    niceness: int = 0  # of the miner
    memory_share: float | None = None  # the miner's, of the one GPU

    def on(self, hardware: Hardware) -> str:
        """Return it in words."""
        if self.memory_share is not None:
            return f"one GPU for both, {self.memory_share:.0%} of its memory the miner's"
        if self.train_units < hardware.num_units:
            return f"{counted(self.mine_units, hardware.unit)} of {hardware.num_units} the miner's"
        return f"all cores for both{f', miner at niceness {self.niceness}' if self.niceness else ''}"

    def settings(self, launch: LaunchSettings, hardware: Hardware) -> list[tuple[str, Any]]:
        """Return the settings with which `negpool run` divides the machine so, no more ranks of a side than it has cores."""
        if self.memory_share is not None:
            return [("launch.train_memory_share", round(1 - self.memory_share, 4))]
        if hardware.gpus:
            return [("launch.mine_ranks", self.mine_units)]
        if self.train_units == hardware.cores:
            return [("launch.mine_cores", None), ("launch.mine_niceness", self.niceness)]
        return [
            ("launch.mine_cores", self.mine_units),
            ("launch.mine_niceness", 0),
            ("launch.train_ranks", min(launch.train_ranks, self.train_units)),
            ("launch.mine_ranks", min(launch.mine_ranks, self.mine_units)),
        ]


def read_shares(words: str | None, hardware: Hardware, launch: LaunchSettings) -> list[Division]:
    """Return the divisions of a list such as 1,all,all:10; None: those that the machine has, a few.

    launch: whose share of a GPU's memory is measured where none is said.
    Raises InputError for one that the machine does not have, with what fits.
    """
    named = _usual(hardware, launch) if words is None else [word.strip() for word in words.split(",") if word.strip()]
    if not named:
        raise InputError(f"--shares {words!r} names no share; {_fitting(hardware)}")
    return [_read(word, hardware) for word in dict.fromkeys(named)]


def _usual(hardware: Hardware, launch: LaunchSettings) -> list[str]:
    """Return numbers that double, up to all but one; beside them on cores what the system divides by itself."""
    if len(hardware.gpus) == 1:
        return [f"{1 - launch.train_memory_share:.4g}"]
    numbers = [str(2**power) for power in range(hardware.num_units.bit_length()) if 2**power < hardware.num_units]
    return numbers if hardware.gpus else [*numbers, ALL, f"{ALL}:{NICE}"]


def _read(word: str, hardware: Hardware) -> Division:
    num_units, (kind, _, niceness) = hardware.num_units, word.partition(":")
    if len(hardware.gpus) == 1:
        share = _number(word)
        if share is not None and 0 < share < 1:
            return Division(word, 1, 1, memory_share=share)
    elif kind == ALL and not hardware.gpus:
        if word == ALL:
            return Division(word, num_units, num_units)
        if niceness.isdecimal() and 0 < int(niceness) <= MOST_NICE:
            return Division(word, num_units, num_units, int(niceness))
    elif word.isdecimal() and 0 < int(word) < num_units:
        return Division(word, num_units - int(word), int(word))
    raise InputError(f"--shares {word} is none that this machine has, {counted(num_units, hardware.unit)}; {_fitting(hardware)}")


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _fitting(hardware: Hardware) -> str:
    """Return which shares the machine has."""
    if len(hardware.gpus) == 1:
        return "expected the miner's share of the GPU's memory, as 0.3"
    most = hardware.num_units - 1
    numbers = "1" if most == 1 else f"1 to {most}"
    if hardware.gpus:
        return f"expected {numbers} of them for the miner alone"
    both = f"{ALL} (both sides use all), or {ALL}:N (the miner at niceness N, 1 to {MOST_NICE})"
    return f"expected {numbers} for the miner alone, {both}" if most else f"expected {both}"


def units_alone(divisions: Sequence[Division], hardware: Hardware) -> tuple[list[int], list[int]]:
    """Return with how many cores or GPUs trainer and miner are measured alone: all, and what each has in a division."""
    train = {hardware.num_units, *(division.train_units for division in divisions)}
    mine = {hardware.num_units, *(division.mine_units for division in divisions)}
    return sorted(train, reverse=True), sorted(mine, reverse=True)
