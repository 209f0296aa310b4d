"""What `negpool compare` found, as tables for a terminal and for a page."""

from typing import Any

from launch.output import MEASURE_TITLES, in_figures
from launch.phases import clock
from launch.report.standing import title_of
from launch.tables import Part, Sheet

BASELINES = ("bm25", "untrained")  # rows that runs of the same data have alike
FACTS = {
    "verdict": "verdict",
    "steps": "steps",
    "seconds": "time",
    "versions_swapped": "mined versions swapped in",
    "tokens_per_rank_per_s": "tokens/s a rank",
    "peak_memory_gib": "peak memory, GiB",
    "last_loss": "loss of the last step",
}


def compare_parts(found: dict[str, Any]) -> list[Part]:
    """Return the comparison as tables and sentences: of `compare_runs`."""
    names = tuple(run["name"] for run in found["runs"])
    measures = ("", *MEASURE_TITLES.values())
    settings = [(key, *(_setting(value) for value in values)) for key, values in found["settings"].items()]
    parts: list[Part] = [Sheet("settings that differ", ("", *names), settings)] if settings else ["All settings are the same."]
    if results := _result_rows(found["runs"]):
        parts.append(Sheet("test queries", measures, results))
    if paired := [_paired_row(each) for each in found["paired"]]:
        parts.append(Sheet("difference of the trained models, query by query, and its 95 % interval", measures, paired))
    facts = [(title, *(_fact(run, key) for run in found["runs"])) for key, title in FACTS.items()]
    sentences = [each["sentence"] for each in found["paired"]]
    return [*parts, Sheet("the runs", ("", *names), facts), *sentences, *found["notes"]]


def _result_rows(runs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row for each model of each run; a baseline that all runs have alike stands there once."""
    rows = []
    for name in (*BASELINES, "trained", "last"):
        have = [run for run in runs if name in run["results"]]
        is_shared = name in BASELINES and len(have) == len(runs) > 0 and len({_rounded(run, name) for run in have}) == 1
        for run in have[:1] if is_shared else have:
            title = title_of(name, "last" in run["results"])
            intervals = run["intervals"].get(name, {})
            cells = (_with_interval(run["results"][name][key], intervals.get(key)) for key in MEASURE_TITLES)
            rows.append((f"{title}, all runs" if is_shared else f"{run['name']}: {title}", *cells))
    return rows


def _rounded(run: dict[str, Any], name: str) -> tuple[float, ...]:
    return tuple(round(run["results"][name][key], 3) for key in MEASURE_TITLES)


def _paired_row(found: dict[str, Any]) -> tuple[str, ...]:
    cells = (_with_interval(found["differences"][key], found["intervals"][key], is_difference=True) for key in MEASURE_TITLES)
    return f"{found['run']} - {found['from']}", *cells


def _with_interval(value: float, interval: list[float] | None, is_difference: bool = False) -> str:
    text = f"{value:+.3f}" if is_difference else f"{value:.3f}"
    return text if interval is None else f"{text}\n{in_figures(interval, is_difference)}"


def _fact(run: dict[str, Any], key: str) -> str:
    value = run[key]
    if key == "verdict" and value["level"] == "unclear" and not run["tested"]:
        return "not tested"
    if key == "verdict":
        return str(run["phase"] or "not started") if value["level"] == "open" else str(value["level"])
    if value is None:
        return "unknown"
    if key == "steps":
        return f"{value:,} of {run['num_steps'] or '?'}"
    if key == "seconds":
        return clock(value)
    return f"{value:,.0f}" if key == "tokens_per_rank_per_s" else f"{value:.3g}" if isinstance(value, float) else str(value)


def _setting(value: Any) -> str:
    """Return a setting as a job file has it."""
    if value is None:
        return "not set"
    return str(value).lower() if isinstance(value, bool) else str(value)
