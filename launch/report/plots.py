"""The pictures of a report about the trainer. Each is kept as a PNG beside the page and as SVG inside it."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes

from launch.output import MEASURE_TITLES
from launch.report.drawing import (
    APART,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Pictures,
    Wanted,
    draw_noisy,
    draw_wanted,
    log_scale,
    thinned,
    whole_steps,
)
from launch.report.history import History
from launch.report.standing import Row
from launch.report.version_plots import draw_versions

PHASES = {"time/encode_s": "encode", "time/loss_s": "loss", "time/backward_s": "backward", "time/data_s": "data"}
RATE, MEMORY, AGE = "tokens_per_rank_per_s", "memory/peak_gib", "negatives/age_steps"
LINE_OF_ROW = {"bm25": (GREY, "--"), "untrained": (ORANGE, "-.")}
DOT_OF_ROW = {"trained": (GREEN, "D"), "last": (RED, "s")}


def draw_all(history: History, rows: list[Row], measure: str) -> Pictures:
    """Return title and picture of everything that there are figures for, by name.

    rows: the table of results. measure: the one whose course is drawn.
    """
    title, has = MEASURE_TITLES[measure], {name for line in history.steps.values() for name in line if line[name] is not None}
    has_quality = rows or history.of_measures(f"dev/{measure}")[0]

    def noisy(name: str, colour: str, unit: float | None = None) -> Callable[[Axes], None]:
        return lambda axes: _noisy(axes, history, name, colour, unit)

    wanted: dict[str, Wanted] = {
        "quality": (
            f"Retrieval quality: {title}\n{APART}",
            f"{title} (0 to 1)",
            has_quality,
            lambda a: _quality(a, history, rows, measure),
        ),
        "loss": ("Loss", "loss, mean over queries (nats)", "loss" in has, noisy("loss", BLUE)),
        "gradient": ("Norm of the gradient", "norm before clipping", "grad_norm" in has, lambda a: _gradient(a, history)),
        "throughput": ("Speed of a trainer rank", "thousand tokens per second", RATE in has, noisy(RATE, BLUE, 1000)),
        "step_time": ("Time of a step", "seconds", "time/step_s" in has, lambda a: _step_time(a, history)),
        "memory": ("Peak memory of rank 0", "GiB", MEMORY in has, noisy(MEMORY, GREEN, 1)),
        "age": ("Age of the negatives", "steps since their checkpoint", AGE in has, lambda a: _age(a, history)),
    }
    return draw_wanted("step", wanted) | draw_versions(history)


def _quality(axes: Axes, history: History, rows: list[Row], measure: str) -> None:
    """Draw dev over the steps; of the test queries the trained model as a dot, the others as lines to compare with."""
    steps, values = history.of_measures(f"dev/{measure}")
    if steps:
        when = "from the untrained model on" if steps[0] == 0 else "while training"
        axes.plot(steps, values, "o-", color=BLUE, markersize=4, label=f"dev queries, {when}")
    for row in rows:
        value = row.values[measure]
        if row.name in LINE_OF_ROW:
            colour, style = LINE_OF_ROW[row.name]
            axes.axhline(value, color=colour, linestyle=style, label=f"{row.title}, test: {value:.3f}")
        elif row.name in DOT_OF_ROW:
            colour, marker = DOT_OF_ROW[row.name]
            at = row.step if row.step is not None else max(history.steps, default=0)
            if bounds := row.intervals.get(measure):
                axes.vlines(at, bounds[0], bounds[1], color=colour, linewidth=1.5)
            axes.plot([at], [value], marker, color=colour, markersize=7, label=f"{row.title}, test: {value:.3f}")
    axes.set_xlim(left=0)
    _mark_swaps(axes, history)


def _noisy(axes: Axes, history: History, name: str, colour: str, unit: float | None = None) -> None:
    """Draw a figure of each step; unit: what it is divided by, of a figure whose zero is worth seeing."""
    steps, values = history.of_steps(name)
    draw_noisy(axes, (steps, [value / (unit or 1) for value in values]), colour)
    if unit is not None:
        axes.set_ylim(bottom=0)
    else:
        _mark_swaps(axes, history)


def _gradient(axes: Axes, history: History) -> None:
    steps, values = history.of_steps("grad_norm")
    draw_noisy(axes, (steps, values), BLUE)
    if min(values) > 0 and max(values) > 30 * min(values):
        log_scale(axes)
    else:
        axes.set_ylim(bottom=0)


def _step_time(axes: Axes, history: History) -> None:
    steps, total = thinned(history.of_steps("time/step_s"))
    parts = {label: np.array([history.steps[int(step)].get(key, 0.0) for step in steps]) for key, label in PHASES.items()}
    rest = np.maximum(0, np.array(total) - sum(parts.values()))
    axes.stackplot(steps, *parts.values(), rest, labels=[*parts, "the rest"], colors=COLOURS, alpha=0.85)
    axes.set_ylim(bottom=0)
    whole_steps(axes)


def _age(axes: Axes, history: History) -> None:
    axes.plot(*thinned(history.of_steps(AGE)), color=ORANGE)
    axes.set_ylim(bottom=0)
    _mark_swaps(axes, history)


def _mark_swaps(axes: Axes, history: History) -> None:
    """Draw a line where negatives came into force, with their version."""
    whole_steps(axes)
    for number, (step, version) in enumerate(history.swaps):
        axes.axvline(step, color=GREY, linewidth=0.8, linestyle=":")
        if len(history.swaps) <= 12 or number % (len(history.swaps) // 12 + 1) == 0:
            axes.annotate(f"v{version}", (step, 1), xycoords=("data", "axes fraction"), fontsize=8, color=GREY, xytext=(2, -9),
                          textcoords="offset points")  # fmt: skip
