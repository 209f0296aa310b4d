"""What of a run is not a step: evaluations, refreshes of the negatives, how old these get, and which miner keeps them younger."""

import math
from dataclasses import dataclass

MOST_RANKS = 2**20  # of a miner


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """One refresh against the trainer's steps."""

    seconds: float
    steps: float  # that pass meanwhile
    youngest_age: int  # steps between a version's checkpoint and its first use
    oldest_age: int  # and its last, when the next version is there


def encoding_seconds(tokens: float, flops_of_token: float, rate: float, num_ranks: int) -> float:
    """Return what ranks take to encode so many tokens without gradients. rate: operations per second of a rank."""
    return tokens * flops_of_token / rate / num_ranks


def search_seconds(num_queries: int, num_passages: int, width: int, rate: float, num_ranks: int) -> float:
    """Return what exact search takes: one product of all queries and all passages."""
    return 2.0 * num_queries * num_passages * width / rate / num_ranks


def refresh_of(seconds: float, step_s: float, every_steps: int) -> Refresh:
    """Return how old negatives are where the miner always takes the newest checkpoint.

    every_steps: between checkpoints. A version is in force from the end of its own refresh to the end of the next one. That
    begins at the next checkpoint, or, where a refresh takes longer, at the newest one when the miner is free.
    """
    steps = seconds / step_s
    youngest = math.ceil(steps)
    if steps <= every_steps:  # the next checkpoint is mined as soon as it is there
        return Refresh(seconds=seconds, steps=steps, youngest_age=youngest, oldest_age=every_steps + youngest)
    late = every_steps  # the newest checkpoint may be almost as old when the miner comes to it
    return Refresh(seconds=seconds, steps=steps, youngest_age=youngest, oldest_age=math.ceil(2 * steps) + late)


def ranks_for_age(seconds_of_one: float, step_s: float, every_steps: int, age_steps: int) -> int | None:
    """Return the fewest ranks of the miner with which no negative is older; None where checkpoints are too rare for that.

    seconds_of_one: a refresh on one rank.
    """
    if age_steps <= every_steps:
        return None
    low, high = 1, MOST_RANKS
    while low < high:
        ranks = (low + high) // 2
        if refresh_of(seconds_of_one / ranks, step_s, every_steps).oldest_age <= age_steps:
            high = ranks
        else:
            low = ranks + 1
    return low if low < MOST_RANKS else None
