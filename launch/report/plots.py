"""The pictures of a report. Each is drawn once and kept as a PNG beside the page and as SVG inside it."""

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.report.history import History, Series

BLUE, GREEN, ORANGE, RED, GREY = "#2a6f97", "#4a8c5f", "#d98e32", "#b5483a", "#8a939b"
COLOURS = (BLUE, ORANGE, GREEN, RED, "#6d5a99", "#4aa3a2", "#a3785a", GREY)
STYLE: dict[Any, Any] = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "negpool", "font.family": "sans-serif"}
SMOOTH = 0.05  # share of a line whose median is shown at each of its places
PHASES = {"time/encode_s": "encode", "time/loss_s": "loss", "time/backward_s": "backward", "time/data_s": "data"}
Draw = Callable[[Axes], None]


def draw_all(history: History) -> dict[str, tuple[str, Figure]]:
    """Return title and picture of everything that a history has figures for, by name."""
    wanted: dict[str, tuple[str, bool, Draw]] = {
        "loss": ("Loss", bool(history.steps), lambda axes: _loss(axes, history)),
        "quality": ("Retrieval quality", bool(history.measures), lambda axes: _quality(axes, history)),
        "throughput": (
            "Throughput, thousand tokens per second of a rank",
            bool(history.steps),
            lambda axes: _throughput(axes, history),
        ),
        "step_time": ("Seconds of a step", bool(history.steps), lambda axes: _step_time(axes, history)),
        "memory": ("Peak memory of rank 0, GiB", bool(history.steps), lambda axes: _memory(axes, history)),
        "age": (
            "Age of the negatives, steps since their checkpoint",
            bool(history.of_steps("negatives/age_steps")[0]),
            lambda axes: _age(axes, history),
        ),
        "filters": ("Candidates dropped, by filter", bool(history.versions), lambda axes: _filters(axes, history)),
        "audit": ("Audit of each version", bool(history.versions), lambda axes: _audit(axes, history)),
        "refresh": ("Seconds of a refresh, by phase", bool(history.versions), lambda axes: _refresh(axes, history)),
    }
    return {name: (title, _figure(draw)) for name, (title, is_there, draw) in wanted.items() if is_there}


def as_png(figure: Figure) -> bytes:
    """Return a picture's PNG."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def as_svg(figure: Figure, name: str) -> str:
    """Return a picture as an element of a page; its ids begin with the name, for a page has one space of ids."""
    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)


def _figure(draw: Draw) -> Figure:
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
    return figure


def _loss(axes: Axes, history: History) -> None:
    steps, values = history.of_steps("loss")
    axes.plot(steps, values, color=BLUE, alpha=0.35, linewidth=1)
    axes.plot(*_smooth((steps, values)), color=BLUE, linewidth=2)
    _mark_swaps(axes, history)


def _quality(axes: Axes, history: History) -> None:
    for split, style in (("dev", "o-"), ("eval", "D")):
        for measure, colour in (("ndcg@10", BLUE), ("mrr@10", ORANGE)):
            steps, values = history.of_measures(f"{split}/{measure}")
            name = {"dev": "dev", "eval": "test"}[split] + " " + {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10"}[measure]
            if steps:
                axes.plot(steps, values, style, color=colour, markersize=4, label=name)
    axes.legend(frameon=False, ncols=2, fontsize=8)
    _mark_swaps(axes, history)


def _throughput(axes: Axes, history: History) -> None:
    steps, values = history.of_steps("tokens_per_rank_per_s")
    _line(axes, (steps, [value / 1000 for value in values]), BLUE)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")


def _step_time(axes: Axes, history: History) -> None:
    steps, total = history.of_steps("time/step_s")
    parts = {label: history.of_steps(key)[1] for key, label in PHASES.items()}
    rest = np.maximum(0, np.array(total) - sum(np.array(values) for values in parts.values()))
    axes.stackplot(steps, *parts.values(), rest, labels=[*parts, "the rest"], colors=COLOURS, alpha=0.85)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    axes.set_xlabel("step")


def _memory(axes: Axes, history: History) -> None:
    _line(axes, history.of_steps("memory/peak_gib"), GREEN)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")


def _age(axes: Axes, history: History) -> None:
    axes.plot(*history.of_steps("negatives/age_steps"), color=ORANGE)
    axes.set_ylim(bottom=0)
    _mark_swaps(axes, history)


def _filters(axes: Axes, history: History) -> None:
    counters = {name: history.versions[v]["dropped"] for v, name in _names(history).items()}
    filters = sorted({name for dropped in counters.values() for name in dropped})
    _stack(axes, list(counters), {name: [dropped.get(name, 0) for dropped in counters.values()] for name in filters})


def _audit(axes: Axes, history: History) -> None:
    names = {"recall": "recall of the index", "jaccard_with_last": "overlap with the version before"}
    names["share_suspected_false"] = "suspected false negatives"
    places = range(len(history.versions))
    for (key, label), colour in zip(names.items(), (GREEN, BLUE, RED), strict=True):
        values = [line["audit"].get(key) for line in history.versions.values()]
        known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", markersize=4, color=colour, label=label)
    axes.set_xticks(list(places), list(_names(history).values()))
    axes.set_ylim(-0.03, 1.05)
    axes.legend(frameon=False, fontsize=8)


def _refresh(axes: Axes, history: History) -> None:
    seconds = {name: history.versions[v]["seconds"] for v, name in _names(history).items()}
    phases = list(dict.fromkeys(phase for of_version in seconds.values() for phase in of_version))
    _stack(axes, list(seconds), {phase: [of_version.get(phase, 0) for of_version in seconds.values()] for phase in phases})


def _names(history: History) -> dict[int, str]:
    return {version: f"v{version}" for version in history.versions}


def _stack(axes: Axes, names: list[str], parts: dict[str, list[float]]) -> None:
    bottom = np.zeros(len(names))
    for (part, values), colour in zip(parts.items(), (COLOURS * 9)[: len(parts)], strict=True):
        axes.bar(names, values, bottom=bottom, label=part.replace("_", " "), color=colour, width=min(0.6, 0.15 * len(names)))
        bottom += values
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _line(axes: Axes, series: Series, colour: str) -> None:
    axes.plot(*series, color=colour, alpha=0.35, linewidth=1)
    axes.plot(*_smooth(series), color=colour, linewidth=2)


def _smooth(series: Series) -> Series:
    """Return the running median of a line."""
    places, values = series
    reach = max(2, round(len(values) * SMOOTH / 2))
    return places, [float(np.median(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]


def _mark_swaps(axes: Axes, history: History) -> None:
    """Draw a line where negatives came into force, with their version."""
    for number, (step, version) in enumerate(history.swaps):
        axes.axvline(step, color=GREY, linewidth=0.8, linestyle=":")
        if len(history.swaps) <= 12 or number % (len(history.swaps) // 12 + 1) == 0:
            axes.annotate(f"v{version}", (step, 1), xycoords=("data", "axes fraction"), fontsize=7, color=GREY, xytext=(2, -8),
                          textcoords="offset points")  # fmt: skip
    axes.set_xlabel("step")
