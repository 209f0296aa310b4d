"""What `negpool bench scaling` measures: one trial, a start of its own, for each size and each round, and in which order.

With strong scaling the queries of a step stay; with weak scaling those of a rank do. The batch of the job is that of the smallest
number of ranks, so both modes have that trial in common.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from launch.counted import counted
from trainer.errors import InputError

MODES = ("strong", "weak")


@dataclass(frozen=True, order=True)
class Trial:
    """One size in one round."""

    ranks: int
    queries: int  # of a step, over all ranks
    round: int  # from 1

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"ranks-{self.ranks}-queries-{self.queries}-round-{self.round}"

    def __str__(self) -> str:
        return f"round {self.round}: {counted(self.ranks, 'rank')}, {counted(self.queries, 'query')}"


def planned(ranks: Sequence[int], queries: int, modes: Sequence[str], rounds: int) -> list[Trial]:
    """Return all trials in their order: the sizes upwards in the first round, downwards in the second, and so on.

    What changes slowly, such as a machine that grows warm, then falls on all sizes alike.
    ranks: ascending. Raises InputError for a batch that cannot be divided.
    """
    refuse_undivided(ranks, queries, modes)
    sizes = sorted({(each, queries_of(mode, each, ranks[0], queries)) for mode in modes for each in ranks})
    return [Trial(*size, number) for number in range(1, rounds + 1) for size in (sizes if number % 2 else sizes[::-1])]


def queries_of(mode: str, ranks: int, smallest: int, queries: int) -> int:
    """Return the queries of a step on so many ranks; queries: those on the smallest number of ranks."""
    return queries if mode == "strong" else queries // smallest * ranks


def refuse_undivided(ranks: Sequence[int], queries: int, modes: Sequence[str]) -> None:
    """Raise InputError, naming the nearest batches that do, where the queries of a step do not fall on all ranks alike."""
    divisors = ranks if "strong" in modes else ranks[:1]
    wrong = next((each for each in divisors if queries % each), None)
    if wrong is None:
        return
    common = math.lcm(*divisors)
    near = [str(each) for each in (queries // common * common, (queries // common + 1) * common) if each]
    leave = "" if len(ranks) == 1 else f", or take {wrong} out of --ranks"
    raise InputError(
        f"batch.queries={queries} cannot be divided by {wrong} ranks; set batch.queries to {' or '.join(near)}, the nearest that "
        f"can{leave}"
    )


def read_ranks(words: str) -> tuple[int, ...]:
    """Return the numbers of ranks of a list such as 1,2,4, ascending; raises InputError."""
    parts = [word.strip() for word in words.split(",") if word.strip()]
    if not parts or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"--ranks {words!r} names no sizes; expected numbers of ranks with commas between them, as 1,2,4")
    return tuple(sorted({int(part) for part in parts}))


def read_modes(words: str) -> tuple[str, ...]:
    """Return the modes of a list such as strong,weak; raises InputError."""
    parts = [word.strip() for word in words.split(",") if word.strip()]
    if not parts or not set(parts) <= set(MODES):
        raise InputError(f"--mode {words!r} is no way to scale; expected strong, weak, or strong,weak")
    return tuple(mode for mode in MODES if mode in parts)


def refuse_too_many(ranks: Sequence[int], places: int, of_what: str) -> None:
    """Raise InputError, with what fits, for more ranks than there are places; of_what: as in `this machine has 2 cores`."""
    if ranks[-1] <= places:
        return
    fit = [each for each in ranks if each <= places]
    fitting = f"--ranks {','.join(map(str, fit))} fits" if fit else f"at most {counted(places, 'rank')} would fit"
    raise InputError(f"--ranks {ranks[-1]} needs a core or a GPU for each rank, and {of_what}; {fitting}")
