"""What trials say of each size: medians over the rounds, their spread, and the efficiency against the smallest size.

Rounds differ more than sizes of one round do, so an efficiency is the median of those of the rounds.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from launch.bench.scaling.trials import Trial
from launch.step_phases import HIDDEN, PHASES

# Of what ranks send to each other; the other phases are work of their own, or waiting.
MESSAGES = ("gather", "reduce_scatter", "parameters", "control")


def summary(
    results: Mapping[Trial, dict[str, Any]], sizes: Mapping[str, Sequence[tuple[int, int]]], fabric: Any
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each mode, one for every size that was measured.

    sizes: (ranks, queries) by mode, ascending. fabric: of `launch.fabric`, for the peak of each collective; None: not known.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for mode, of_mode in sizes.items():
        rounds = [{trial.round: result for trial, result in results.items() if _size(trial) == size} for size in of_mode]
        measured = [each for each in rounds if each]
        found[mode] = [_row(each, measured[0], fabric) for each in measured]
    return found


def _size(trial: Trial) -> tuple[int, int]:
    return trial.ranks, trial.queries


def _row(rounds: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]], fabric: Any) -> dict[str, Any]:
    """Return the figures of one size; rounds: of it, base: of the smallest size, by number."""
    first, of_rounds = rounds[min(rounds)], [_step_s(each) for each in rounds.values()]
    all_steps = [seconds for each in rounds.values() for seconds in each["step_s"]]
    efficiency = _against(rounds, base, _rate)
    products_s = [each["flops"] / each["ranks"] / each["matmul_flops_per_s"] for each in rounds.values()]
    return {
        **{name: first[name] for name in ("ranks", "nodes", "queries", "queries_per_rank", "tokens")},
        "rounds": len(rounds),
        "step_s": statistics.median(of_rounds),
        "step_s_of_rounds": [min(of_rounds), max(of_rounds)],
        "step_s_quartiles": _quartiles(all_steps),
        "tokens_per_s": _median(rounds, lambda each: each["tokens"] / _step_s(each)),
        "efficiency": statistics.median(efficiency),
        "efficiency_of_rounds": [min(efficiency), max(efficiency)],
        "matmul_efficiency": statistics.median(_against(rounds, base, lambda each: each["matmul_flops_per_s"])),
        "share_of_matmul_rate": statistics.median(s / t for s, t in zip(products_s, of_rounds, strict=True)),
        "phases": _phases(rounds),
        "bytes": first["bytes"] | {"interface": _interface(rounds)},
        "bus": _bus(rounds, None if fabric is None else fabric.inside if first["nodes"] == 1 else fabric.between),
        "peak_gib": _median(rounds, lambda each: max(rank["peak_gib"] for rank in each["ranks_measured"])),
        **_slowest(rounds),
    }


def _against(rounds: Mapping[int, dict[str, Any]], base: Mapping[int, dict[str, Any]], of: Any) -> list[float]:
    """Return the ratios of a figure to the smallest size's in the same round, or of the medians where no round has both."""
    return [of(rounds[n]) / of(base[n]) for n in rounds.keys() & base.keys()] or [_median(rounds, of) / _median(base, of)]


def _median(rounds: Mapping[int, dict[str, Any]], of: Any) -> float:
    return statistics.median(of(each) for each in rounds.values())


def _step_s(result: dict[str, Any]) -> float:
    return statistics.median(result["step_s"])


def _rate(result: dict[str, Any]) -> float:
    """Return the queries of a rank and a second, which would be the same for every size of either mode in an ideal world."""
    return result["queries"] / result["ranks"] / _step_s(result)


def _quartiles(values: Sequence[float]) -> list[float]:
    """Return between which two values the middle half lies."""
    if len(values) == 1:
        return [values[0]] * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def _phases(rounds: Mapping[int, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return of each phase that is known the mean of all ranks, that of the rank with the most, and the share of a step.

    Shares are of the sum of all phases, which is a rank's whole step, with its waiting.
    """
    known = [name for name in (*PHASES, HIDDEN) if all(each["phases"][name] is not None for each in rounds.values())]
    found = {n: {k: _median(rounds, lambda each, n=n, k=k: each["phases"][n][k]) for k in ("mean_s", "max_s")} for n in known}
    whole = sum(seconds["mean_s"] for name, seconds in found.items() if name != HIDDEN)
    return {name: seconds | {"share": seconds["mean_s"] / whole if whole else 0.0} for name, seconds in found.items()}


def _interface(rounds: Mapping[int, dict[str, Any]]) -> dict[str, Any] | None:
    counted = [each["bytes"]["interface"] for each in rounds.values()]
    if None in counted:
        return None
    return counted[0] | {"sent": statistics.median(each["sent"] for each in counted)}


def _bus(rounds: Mapping[int, dict[str, Any]], peaks: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the messages of a step by collective and size, with the peak of each collective where it is known."""
    calls: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for each in rounds.values():
        for call in each["bus"]:
            calls.setdefault((call["collective"], call["num_bytes"]), []).append(call)
    found = []
    for (collective, num_bytes), measured in sorted(calls.items()):
        peak = (peaks or {}).get(collective)
        times = {key: statistics.median(call[key] for call in measured) for key in ("median_s", "bytes_per_s")}
        of_peak = None if peak is None else peak.bytes_per_s
        found.append({"collective": collective, "num_bytes": num_bytes, **times, "peak_bytes_per_s": of_peak})
    return found


def _slowest(rounds: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the host that was the slowest most often, and how much longer its slowest rank works than the fastest of all."""
    hosts = [each["slowest_host"] for each in rounds.values()]
    busy = [[rank["busy_s"] for rank in each["ranks_measured"]] for each in rounds.values()]
    return {
        "slowest_host": statistics.mode(hosts),
        "slowest_over_fastest": statistics.median(max(each) / min(each) if min(each) else 1.0 for each in busy),
    }
