"""From the spans of every rank to the phases of a step, and to who waited for whom.

No clocks are compared. All ranks are in a collective until the last has come; that one's time is what the collective takes, and
what it takes longer on another rank is that rank's waiting for slower ones. The same holds for what a step waits for the sum of
the parameters' gradients.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradcache.buckets import BUCKET, split_reductions
from gradcache.spans import TimedSpan
from gradcache.traffic import Message, sent_bytes
from launch.step_phases import HIDDEN, OF_SPANS, PHASES, REST

STEP = "step"  # the name of the span around all others


@dataclass(frozen=True)
class Call:
    """What all ranks do together in a step, on one of them."""

    phase: str
    collective: str | None  # None: not one alone
    num_bytes: int
    seconds: float  # on this rank


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """A step on one rank."""

    step_s: float
    own_s: dict[str, float]  # by phase, of what this rank does alone
    shared: list[Call]
    hidden_s: float = 0.0  # of parameters' sums beside a backward
    buckets: list[Call] = field(default_factory=list)


def times_of_step(spans: Sequence[TimedSpan]) -> StepTimes:
    """Return what a step took on this rank, from its spans."""
    own_s: dict[str, float] = {}
    shared = []
    buckets = [each for each in spans if each.name == BUCKET]
    for each in spans:
        phase = OF_SPANS.get(each.name, REST)
        if each.name == BUCKET:
            continue
        if each.collective is not None:
            shared.append(Call(phase, each.collective, each.num_bytes, each.duration_s))
        else:
            own_s[phase] = own_s.get(phase, 0.0) + each.self_s
    hidden_s = 0.0
    if buckets:
        end_s = max(each.end_s for each in spans if each.name == "backward")
        exposed_s, hidden_s = split_reductions(buckets, end_s)
        own_s["encode_again"] -= exposed_s
        shared.append(Call("parameters", None, sum(each.num_bytes for each in buckets), exposed_s))
    (step,) = [each for each in spans if each.name == STEP]
    of_buckets = [Call("parameters", "all_reduce", each.num_bytes, each.duration_s) for each in buckets]
    return StepTimes(step_s=step.duration_s, own_s=own_s, shared=shared, hidden_s=hidden_s, buckets=of_buckets)


@dataclass(frozen=True)
class RankTimes:
    """The steps of one rank, beside those of the others."""

    step_s: list[float]
    phases: dict[str, list[float]]  # of each step

    @property
    def busy_s(self) -> float:
        """The median of what a step takes without waiting for others."""
        return statistics.median(step - idle for step, idle in zip(self.step_s, self.phases["idle"], strict=True))

    @property
    def idle_s(self) -> float:
        """The median of that waiting."""
        return statistics.median(self.phases["idle"])


def compared(steps_of_ranks: Sequence[Sequence[StepTimes]]) -> list[RankTimes]:
    """Return each rank's phases; steps_of_ranks: the same steps of each rank."""
    found = [RankTimes([], {phase: [] for phase in (*PHASES, HIDDEN)}) for _ in steps_of_ranks]
    for of_ranks in zip(*steps_of_ranks, strict=True):
        taken_s = _least(of_ranks, lambda step: step.shared)
        hidden_s = min(step.hidden_s for step in of_ranks)
        for rank, step in zip(found, of_ranks, strict=True):
            phases = {phase: step.own_s.get(phase, 0.0) for phase in PHASES}
            for each, seconds in zip(step.shared, taken_s, strict=True):
                phases[each.phase] += seconds
                phases["idle"] += each.seconds - seconds
            phases[HIDDEN] = hidden_s
            rank.step_s.append(step.step_s)
            for phase, seconds in phases.items():
                rank.phases[phase].append(seconds)
    return found


def _least(of_ranks: Sequence[StepTimes], kind: Callable[[StepTimes], list[Call]]) -> list[float]:
    """Return of each thing that the ranks did together the seconds of the rank that came last."""
    return [min(each.seconds for each in together) for together in zip(*(kind(step) for step in of_ranks), strict=True)]


def phases_of(ranks: Sequence[RankTimes], unknown: Iterable[str] = ()) -> dict[str, dict[str, float] | None]:
    """Return of each phase the mean and the largest of the ranks' medians; None for those that are not known."""
    found: dict[str, dict[str, float] | None] = dict.fromkeys((*PHASES, HIDDEN))
    for phase in found.keys() - set(unknown):
        medians = [statistics.median(rank.phases[phase]) for rank in ranks]
        found[phase] = {"mean_s": statistics.mean(medians), "max_s": max(medians)}
    return found


def bus_bandwidths(steps_of_ranks: Sequence[Sequence[StepTimes]]) -> list[dict[str, Any]]:
    """Return of each kind and size of collective its median time, without waiting for others, and bandwidth.

    Source of the bandwidth's definition: nccl-tests, doc/PERFORMANCE.md.
    """
    seconds: dict[tuple[Any, int], list[float]] = {}
    for of_ranks in zip(*steps_of_ranks, strict=True):
        for kind in (lambda step: step.shared, lambda step: step.buckets):
            for each, least_s in zip(kind(of_ranks[0]), _least(of_ranks, kind), strict=True):
                if each.collective is not None and each.num_bytes:
                    seconds.setdefault((each.collective, each.num_bytes), []).append(least_s)
    rows = []
    for (collective, num_bytes), taken in sorted(seconds.items()):
        median_s = statistics.median(taken)
        if median_s > 0:  # else too short for the clock
            sent = sent_bytes(Message(collective, "", num_bytes), len(steps_of_ranks))
            row = {"collective": collective, "num_bytes": num_bytes, "median_s": median_s, "count": len(taken)}
            rows.append(row | {"bytes_per_s": sent / median_s})
    return rows
